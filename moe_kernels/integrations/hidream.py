"""HiDream-I1 in diffusers: ``MOEFeedForwardSwiGLU``, token choice with raw softmax weights."""

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
from moe_kernels.integrations.expert_list import ExpertList
from moe_kernels.router import token_choice


class HiDream(Adapter):
    """``out = shared_experts(x) + Σ_k softmax(x W_gate)_k · w2(silu(w1 x) · w3 x)``.

    The original's balance loss is computed in training and thrown away; here it is not computed.
    """

    family = "HiDream-I1"
    class_names = ("MOEFeedForwardSwiGLU",)
    differentiable_in_eval = False  # its experts run under no_grad then
    experts = ExpertList(("w1", "w3"), "w2", class_name="HiDreamImageFeedForwardSwiGLU")

    def why_not(self, module: Any) -> str | None:
        reason = missing_attributes(module, ("gate", "experts", "shared_experts"))
        reason = reason or missing_attributes(module.gate, ("weight", "top_k", "norm_topk_prob"))
        if reason is not None:
            return reason
        if getattr(module.gate, "scoring_func", "softmax") != "softmax":
            return f"its gate scores by {module.gate.scoring_func!r}, not by softmax"
        if module.gate.weight.shape[0] != len(module.experts):
            return (
                f"the gate has {module.gate.weight.shape[0]} rows for {len(module.experts)} experts"
            )
        return self._why_not_gate(module.gate) or self.experts.why_not(module.experts)

    def describe(self, module: Any) -> str:
        return f"{len(module.experts)} experts, top {module.gate.top_k}, shared expert"

    def pack(self, module: Any) -> str | None:
        return self.experts.pack(module.experts)

    def changed(self, module: Any) -> str | None:
        return self._why_not_gate(module.gate) or self.experts.changed(module.experts)

    def _why_not_gate(self, gate: Any) -> str | None:
        return why_bypassing_is_wrong(gate, "gate", "MoEGate")

    def differentiable(self, module: nn.Module) -> bool:
        as_in_eval = getattr(module, "_force_inference_output", False)
        return super().differentiable(module) and not as_in_eval

    def forward(self, module: Any, x: Tensor) -> Tensor:
        gate, backend = module.gate, backend_of(module)
        tokens = x.reshape(-1, x.shape[-1])
        # The original's own product, in its dtype: equal logits, hence equal choices.
        router_logits = F.linear(tokens, gate.weight)
        plan = token_choice(
            router_logits,
            gate.top_k,
            normalize="per_token" if gate.norm_topk_prob and gate.top_k > 1 else "none",
            check_finite=False,
            backend=backend,
        )
        shared = module.shared_experts(x).reshape(tokens.shape)
        operands = self.experts.operands(module.experts)
        out = expert_mlp(
            tokens, plan, **operands, activation="swiglu", shared=shared, backend=backend
        )
        return out.view(x.shape)

    def example(self, module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
        weight: nn.Parameter = module.gate.weight
        return (random_tokens((2, 32, weight.shape[1]), weight, generator),)
