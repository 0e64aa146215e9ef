"""Dispatch and combine as ops; each is the other's backward."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels.ops.operator import Operator

# rows[r] = weights[r] * x[token_indices[r]]; dweights[r] = <x[token_indices[r]], values[r]>.
gather = Operator(
    "gather(Tensor x, Tensor token_indices, Tensor? weights, Tensor? values) -> (Tensor, Tensor)",
    lambda x, token_indices, weights, values: (
        x.new_empty(token_indices.shape[0], x.shape[1]),
        x.new_empty(0) if values is None else torch.empty_like(weights),
    ),
)


def _sum_fake(
    rows: Tensor, weights: Tensor | None, row_indices: Tensor, row_offsets: Tensor
) -> Tensor:
    return rows.new_empty(row_offsets.shape[0] - 1, rows.shape[1])


# out[t] = sum of weights[r] * rows[r] over the rows r of t.
sum_rows = Operator(
    "sum_rows(Tensor rows, Tensor? weights, Tensor row_indices, Tensor row_offsets) -> Tensor",
    _sum_fake,
)


def _save_dispatch(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _dispatch_backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None, None]:
    return sum_rows[ctx.backend](drows, None, *ctx.saved_tensors), None, None, None


dispatch = Operator(
    "dispatch(Tensor x, Tensor token_indices, Tensor row_indices, Tensor row_offsets) -> Tensor",
    lambda x, token_indices, row_indices, row_offsets: x.new_empty(
        token_indices.shape[0], x.shape[1]
    ),
    setup_context=_save_dispatch,
    backward=_dispatch_backward,
)


def _combine_fake(
    rows: Tensor,
    weights: Tensor,
    shared: Tensor | None,
    residual: Tensor | None,
    token_indices: Tensor,
    row_indices: Tensor,
    row_offsets: Tensor,
) -> Tensor:
    return rows.new_empty(row_offsets.shape[0] - 1, rows.shape[1])


def _save_combine(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    rows, weights, _, _, token_indices = inputs[:5]
    ctx.save_for_backward(rows, weights, token_indices)


def _combine_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    rows, weights, token_indices = ctx.saved_tensors
    values = rows if ctx.needs_input_grad[1] else None
    drows, dweights = gather[ctx.backend](dout, token_indices, weights, values)
    dterms = (dout if need else None for need in ctx.needs_input_grad[2:4])
    return drows, None if values is None else dweights, *dterms, None, None, None


# out[t] = sum of weights[r] * rows[r] over the rows r of t, plus shared[t] and residual[t].
combine = Operator(
    "combine(Tensor rows, Tensor weights, Tensor? shared, Tensor? residual, "
    "Tensor token_indices, Tensor row_indices, Tensor row_offsets) -> Tensor",
    _combine_fake,
    setup_context=_save_combine,
    backward=_combine_backward,
)
