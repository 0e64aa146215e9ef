"""DiT-MoE and TC-DiT: ``SparseMoeBlock``, token choice with softmax weights and a balance loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.expert_mlp import expert_mlp
from moe_kernels.integrations.adapter import (
    Adapter,
    backend_of,
    missing_attributes,
    random_tokens,
    why_bypassing_is_wrong,
)
from moe_kernels.integrations.expert_kinds import expert_kind, why_not_experts
from moe_kernels.integrations.fp64 import in_fp64
from moe_kernels.losses import load_balance_loss
from moe_kernels.router import token_choice


class DiTMoE(Adapter):
    """``out = shared_experts(x) + Σ_k p_k · expert_k(x)``, p the softmax of ``gate.weight x``.

    In training the gradient of ``alpha`` times the balance loss (of each image with ``seq_aux``) is
    added to the router's, with weight 1 whatever the upstream gradient, as the original adds it.

    TC-DiT's block in the DiffMoE and ProMoE repositories is the same with other experts.

    What the original does not do: the routed experts have gradients in evaluation, autocast works,
    TC-DiT trains in 16 bits, and ``alpha = 0`` trains without a balance loss.
    """

    family = "DiT-MoE"
    class_names = ("SparseMoeBlock", "SparseMoEBlock")
    differentiable_in_eval = False

    def matches(self, module: Any, class_name: str) -> bool:
        # EC-DiT's block has TC-DiT's name, but no gate.
        return class_name == "SparseMoeBlock" or (
            class_name == "SparseMoEBlock" and hasattr(module, "gate")
        )

    def why_not(self, module: Any) -> str | None:
        reason = missing_attributes(module, ("gate", "experts", "n_shared_experts"))
        names = ("weight", "top_k", "scoring_func", "alpha", "seq_aux", "norm_topk_prob")
        reason = reason or missing_attributes(module.gate, names)
        if reason is not None:
            return reason
        gate = module.gate
        if gate.scoring_func != "softmax":
            return f"its gate scores by {gate.scoring_func!r}, not by softmax"
        reason = why_bypassing_is_wrong(gate, "gate") or why_not_experts(module.experts)
        if reason is None and gate.weight.shape[0] != len(module.experts):
            return f"gate.weight has {gate.weight.shape[0]} rows for {len(module.experts)} experts"
        return reason

    def describe(self, module: Any) -> str:
        shared = ", shared expert" if module.n_shared_experts else ""
        return f"{len(module.experts)} experts, top {module.gate.top_k}{shared}"

    def pack(self, module: Any) -> str | None:
        return expert_kind(module.experts).pack(module.experts)

    def changed(self, module: Any) -> str | None:
        reason = why_bypassing_is_wrong(module.gate, "gate")
        return reason or expert_kind(module.experts).changed(module.experts)

    def forward(self, module: Any, hidden_states: Tensor) -> Tensor:
        gate, experts, backend = module.gate, module.experts, backend_of(module)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        # The original's own product, in its dtype: equal logits, hence equal choices.
        plan = token_choice(
            F.linear(tokens, gate.weight),
            gate.top_k,
            normalize="per_token" if gate.norm_topk_prob and gate.top_k > 1 else "none",
            num_groups=max(hidden_states.shape[0], 1),
            check_finite=False,
            backend=backend,
        )
        shared = None
        if module.n_shared_experts:
            shared = module.shared_experts(hidden_states).reshape(tokens.shape)
        kind = expert_kind(experts)
        out = expert_mlp(
            tokens,
            plan,
            **kind.operands(experts),
            activation=kind.activation(experts),
            shared=shared,
            backend=backend,
        )
        if module.training and gate.training and gate.alpha > 0:
            loss = load_balance_loss(plan, per_sequence=bool(gate.seq_aux), backend=backend)
            out = _AddLoss.apply(out, gate.alpha * loss)
        return out.view(hidden_states.shape)

    def exact(self, original: Any) -> nn.Module:
        return in_fp64(original)

    def example(self, module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
        weight: nn.Parameter = module.gate.weight
        return (random_tokens((2, 32, weight.shape[1]), weight, generator),)


class _AddLoss(torch.autograd.Function):
    """Returns x; in backward the loss gets the gradient 1, and so adds its own to the routers'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)
