"""Expert MLP and grouped GEMM as ops.

A weight may come in either layout of ``ops.layout``; its gradient has the same.
``rows_per_expert`` is that of equal groups (expert choice), 0 for ragged ones.
"""

from typing import Any

import torch
from torch import Tensor

from moe_kernels.ops.layout import empty_like
from moe_kernels.ops.operator import Operator

Optional = Tensor | None


def _mlp_fake(
    x: Tensor,
    routing_weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    bias_in: Optional,
    bias_out: Optional,
    shared: Optional,
    residual: Optional,
    token_indices: Tensor,
    row_indices: Tensor,
    row_offsets: Tensor,
    expert_offsets: Tensor,
    rows_per_expert: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, x.new_empty(token_indices.shape[0], w_in.shape[1])


def _mlp_bwd_fake(
    dout: Tensor,
    h: Tensor,
    wanted: list[bool],
    x: Tensor,
    routing_weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    bias_in: Optional,
    bias_out: Optional,
    *_: Any,
) -> tuple[Tensor, ...]:
    inputs = (x, routing_weights, w_in, w_out, bias_in, bias_out)
    return tuple(
        empty_gradient(x, tensor, want) for tensor, want in zip(inputs, wanted, strict=True)
    )


def empty_gradient(like: Tensor, tensor: Optional, wanted: bool) -> Tensor:
    """Uninitialised gradient of ``tensor``, or an empty tensor where none is wanted."""
    if tensor is None or not wanted:
        return like.new_empty(0)
    return empty_like(tensor)


def _save_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    h = output[1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h)
    ctx.save_for_backward(h, *inputs[:6], *inputs[8:12])
    ctx.settings = inputs[12:]


def _mlp_backward(ctx: Any, dout: Optional, _: None) -> tuple[Optional, ...]:
    if dout is None:
        return (None,) * 14
    h, *inputs = ctx.saved_tensors
    wanted = [bool(need) for need in ctx.needs_input_grad[:6]]
    gradients = expert_mlp_bwd[ctx.backend](dout, h, wanted, *inputs, *ctx.settings)
    used = [g if want else None for g, want in zip(gradients, wanted, strict=True)]
    dterms = (dout if need else None for need in ctx.needs_input_grad[6:8])
    return (*used, *dterms, *(None,) * 6)


def _mlp_flops(x: Any, weights: Any, w_in: Any, w_out: Any, *args: Any, **_: Any) -> int:
    rows = args[4][0]  # token_indices
    return 2 * rows * (w_in[1] * w_in[2] + w_out[1] * w_out[2])


def _mlp_bwd_flops(dout: Any, h: Any, wanted: list[bool], *inputs: Any, **_: Any) -> int:
    w_in, w_out = inputs[2], inputs[3]
    rows, into, out = h[0], w_in[1] * w_in[2], w_out[1] * w_out[2]
    # d(activation) is always needed; then dx, dw_in and dw_out.
    return 2 * rows * (out + wanted[0] * into + wanted[2] * into + wanted[3] * out)


_MLP_TENSORS = (
    "Tensor x, Tensor routing_weights, Tensor w_in, Tensor w_out, Tensor? bias_in, Tensor? bias_out"
)
_MLP_INDICES = (
    "Tensor token_indices, Tensor row_indices, Tensor row_offsets, Tensor expert_offsets, "
    "SymInt rows_per_expert, str activation"
)

# Gradients of the first six inputs; empty where not wanted.
expert_mlp_bwd = Operator(
    f"expert_mlp_bwd(Tensor dout, Tensor h, bool[] wanted, {_MLP_TENSORS}, {_MLP_INDICES}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mlp_bwd_fake,
    flops=_mlp_bwd_flops,
)

# The output (T, D) with shared and residual added, and h (R, rows of w_in): the first product
# before bias, saved for backward.
expert_mlp = Operator(
    f"expert_mlp({_MLP_TENSORS}, Tensor? shared, Tensor? residual, {_MLP_INDICES}) "
    "-> (Tensor, Tensor)",
    _mlp_fake,
    setup_context=_save_mlp,
    backward=_mlp_backward,
    flops=_mlp_flops,
    autocast=(0, 2, 3, 4, 5),
)


def _gemm_flops(rows: Any, w: Any, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * w[1] * w[2]


def _save_gemm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.rows_per_expert = inputs[3]


def _gemm_backward(ctx: Any, dout: Tensor) -> tuple[Optional, ...]:
    wanted = [bool(need) for need in ctx.needs_input_grad[:2]]
    drows, dw = grouped_gemm_bwd[ctx.backend](dout, wanted, *ctx.saved_tensors, ctx.rows_per_expert)
    return drows if wanted[0] else None, dw if wanted[1] else None, None, None


grouped_gemm_bwd = Operator(
    "grouped_gemm_bwd(Tensor dout, bool[] wanted, Tensor rows, Tensor w, Tensor expert_offsets, "
    "SymInt rows_per_expert) -> (Tensor, Tensor)",
    lambda dout, wanted, rows, w, expert_offsets, rows_per_expert: (
        empty_gradient(rows, rows, wanted[0]),
        empty_gradient(rows, w, wanted[1]),
    ),
    flops=lambda dout, wanted, rows, w, *_, **__: sum(wanted) * _gemm_flops(rows, w),
)

grouped_gemm = Operator(
    "grouped_gemm(Tensor rows, Tensor w, Tensor expert_offsets, SymInt rows_per_expert) -> Tensor",
    lambda rows, w, expert_offsets, rows_per_expert: rows.new_empty(rows.shape[0], w.shape[1]),
    setup_context=_save_gemm,
    backward=_gemm_backward,
    flops=_gemm_flops,
    autocast=(0, 1),
)
