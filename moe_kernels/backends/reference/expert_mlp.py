"""Reference of ``moe_kernels.expert_mlp``: the stages one after the other."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.autocast import autocast_operands
from moe_kernels.backends.reference.combine import combine
from moe_kernels.backends.reference.dispatch import dispatch
from moe_kernels.backends.reference.grouped_gemm import grouped_gemm
from moe_kernels.plan import RoutingPlan


def activate(h: Tensor, activation: str) -> Tensor:
    """GELU (tanh or exact), or SwiGLU with the gate half first."""
    if activation == "swiglu":
        gate_half, up_half = h.chunk(2, dim=-1)
        return F.silu(gate_half) * up_half
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


def add_bias(rows: Tensor, bias: Tensor | None, plan: RoutingPlan) -> Tensor:
    """Add each expert's bias to its rows in fp32 (fp64 for fp64 rows).

    ``F.embedding`` sums the gradient of a bias in a fixed order.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    rows = rows.to(wide)
    if bias is None:
        return rows
    if plan.rows_per_expert is None:
        return rows + F.embedding(plan.expert_of_row, bias.to(wide))
    grouped = rows.view(plan.num_experts, plan.rows_per_expert, rows.shape[1])
    return (grouped + bias.to(wide).unsqueeze(1)).view_as(rows)


def expert_mlp(
    x: Tensor,
    plan: RoutingPlan,
    w_in: Tensor | list[Tensor],
    w_out: Tensor | list[Tensor],
    *,
    activation: str,
    bias_in: Tensor | list[Tensor] | None,
    bias_out: Tensor | list[Tensor] | None,
    shared: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Dispatch, grouped GEMM, activation, grouped GEMM, combine.

    Biases, activation and weighted sum are in fp32 and cast once; under autocast the operands of
    the products are cast to its dtype.
    """
    rows = dispatch(x, plan)  # (R, D)
    stacked: list[Any] = [
        torch.cat(w).unflatten(0, (plan.num_experts, -1)) if isinstance(w, list) else w
        for w in (w_in, w_out, bias_in, bias_out)
    ]
    rows, up, down = autocast_operands(rows, *stacked[:2])
    h = grouped_gemm(rows, up, plan.expert_offsets, plan.rows_per_expert)  # (R, F or 2F)
    a = activate(add_bias(h, stacked[2], plan), activation).to(h.dtype)  # (R, F)
    y = grouped_gemm(a, down, plan.expert_offsets, plan.rows_per_expert)  # (R, D)
    return combine(add_bias(y, stacked[3], plan), plan, shared, residual).to(x.dtype)  # (T, D)
