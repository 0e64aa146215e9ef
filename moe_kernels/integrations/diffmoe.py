"""EC-DiT as the DiffMoE and ProMoE repositories have it: ``SparseMoEBlock``, expert choice."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.expert_mlp import expert_mlp
from moe_kernels.integrations.adapter import (
    Adapter,
    backend_of,
    missing_attributes,
    random_tokens,
)
from moe_kernels.integrations.expert_kinds import expert_kind, why_not_experts
from moe_kernels.router import expert_choice


class ECDiT(Adapter):
    """``out = shared_experts(x) + Σ_e p_e · expert_e(x)`` over the experts that took the token.

    Expert e takes the C = int(S / E · capacity) tokens of each image with the largest p_e, the
    softmax of ``gate_weight x``; the attribute ``capacity`` is the factor.

    Three blocks of these repositories share the class name. That of TC-DiT, which has a ``gate``,
    is served as DiT-MoE's; DiffMoE's own, which has a ``capacity_predictor``, is not served.
    """

    family = "EC-DiT"
    class_names = ("SparseMoEBlock",)

    def why_not(self, module: Any) -> str | None:
        names = ("gate_weight", "experts", "capacity", "num_experts", "n_shared_experts")
        reason = missing_attributes(module, names)
        if reason is not None:
            return reason
        if hasattr(module, "capacity_predictor"):
            return (
                "it is DiffMoE's block with a capacity predictor, whose experts take a number of "
                "tokens that depends on the data"
            )
        reason = why_not_experts(module.experts)
        rows = module.gate_weight.shape[0]
        if reason is None and not rows == len(module.experts) == module.num_experts:
            return (
                f"gate_weight has {rows} rows for {len(module.experts)} experts; num_experts is "
                f"{module.num_experts}"
            )
        return reason

    def describe(self, module: Any) -> str:
        shared = ", shared expert" if module.n_shared_experts else ""
        return f"{module.num_experts} experts, capacity factor {module.capacity}{shared}"

    def pack(self, module: Any) -> str | None:
        return expert_kind(module.experts).pack(module.experts)

    def changed(self, module: Any) -> str | None:
        return expert_kind(module.experts).changed(module.experts)

    def forward(self, module: Any, x: Tensor) -> Tensor:
        batch_size, seq_len, hidden_size = x.shape
        capacity = int((seq_len / module.num_experts) * module.capacity)
        if capacity == 0:  # no expert takes a token, but each has a gradient of zeros
            return module.original_class.forward(module, x)
        experts, backend = module.experts, backend_of(module)
        tokens = x.reshape(-1, hidden_size)
        # The original's own product, in its dtype: equal logits, hence equal choices.
        plan = expert_choice(
            F.linear(tokens, module.gate_weight),
            capacity=capacity,
            num_groups=batch_size,
            check_finite=False,
            backend=backend,
        )
        shared = None
        if module.n_shared_experts:
            shared = module.shared_experts(x).reshape(tokens.shape)
        kind = expert_kind(experts)
        out = expert_mlp(
            tokens,
            plan,
            **kind.operands(experts),
            activation=kind.activation(experts),
            shared=shared,
            backend=backend,
        )
        return out.view(x.shape)

    def example(self, module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
        weight = module.gate_weight
        shape = (2, max(32, module.num_experts), weight.shape[1])
        return (random_tokens(shape, weight, generator),)
