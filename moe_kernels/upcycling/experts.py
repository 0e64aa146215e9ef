"""Experts with an activation that the fused expert MLP does not have."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels.backends.reference.expert_mlp import add_bias
from moe_kernels.combine import combine
from moe_kernels.dispatch import dispatch
from moe_kernels.expert_mlp import grouped_gemm
from moe_kernels.layers import GroupedExperts
from moe_kernels.plan import RoutingPlan
from moe_kernels.upcycling.activations import activate, activation_words


class UnfusedExperts(GroupedExperts):
    """E MLPs of GEGLU, quick GELU, SiLU, ...: dispatch, two grouped products and combine.

    The products run in the kernels; bias and activation are PyTorch's, in fp32 as in the fused
    MLP, so the (R, F) intermediates are kept for backward. Parameters are those of
    ``GroupedExperts``: laid out as for SwiGLU when gated, else as for GELU.

    Args:
        hidden_size: D.
        intermediate_size: F.
        num_experts: E.
        elementwise: a key of ``moe_kernels.upcycling.activations.ELEMENTWISE``.
        gated: ``act(gate) · up``, gate half first, instead of ``act(up)``.
        bias: whether both projections have biases.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        elementwise: str,
        gated: bool,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            *(hidden_size, intermediate_size, num_experts, "swiglu" if gated else "gelu", bias),
            device=device,
            dtype=dtype,
        )
        self.elementwise = elementwise
        self.gated = gated

    def compute(
        self,
        x: Tensor,
        plan: RoutingPlan,
        weights: list[Any],
        shared: Tensor | None = None,
    ) -> Tensor:
        """``forward`` with the weights that are given, for the plan's experts."""
        w_in, w_out, bias_in, bias_out = weights
        equal = plan.rows_per_expert
        offsets = plan.expert_offsets
        rows = dispatch(x, plan)  # (R, D)
        h = grouped_gemm(rows, w_in, offsets, rows_per_expert=equal)
        a = activate(add_bias(h, bias_in, plan), self.elementwise, self.gated).to(h.dtype)
        y = grouped_gemm(a, w_out, offsets, rows_per_expert=equal)  # (R, D)
        return combine(add_bias(y, bias_out, plan), plan, shared=shared).to(x.dtype)

    def extra_repr(self) -> str:
        experts, hidden_size, intermediate_size = self.down_proj.shape
        words = activation_words(self.elementwise, self.gated)
        return f"{hidden_size}, {intermediate_size}, {experts}, activation={words!r}"
