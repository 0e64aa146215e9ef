"""Dispatch and combine: gather rows, and sum the rows of each token without atomics.

Each is the backward of the other. The sum reads the plan's token -> rows lists, so the order of the
additions is fixed and every output element is written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton.launch import DEVICE_TYPES, PARTS, block_size, launch
from moe_kernels.ops import rows as ops


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=PARTS)
def _sum_rows_kernel(
    rows_ptr,
    weights_ptr,
    row_indices_ptr,
    row_offsets_ptr,
    shared_ptr,
    residual_ptr,
    out_ptr,
    num_tokens,
    HIDDEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t] = sum of weights[r] * rows[r] over the rows r of t, in fp32, + shared + residual."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # (BLOCK_T,)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    is_token = token < num_tokens
    start = tl.load(row_offsets_ptr + token, mask=is_token, other=0)  # (BLOCK_T,)
    end = tl.load(row_offsets_ptr + token + 1, mask=is_token, other=0)  # (BLOCK_T,)
    is_column = column < HIDDEN
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for i in range(tl.max(end - start, axis=0)):
        slot = start + i
        used = slot < end
        row = tl.load(row_indices_ptr + slot, mask=used, other=0).to(tl.int64)  # (BLOCK_T,)
        place = row[:, None] * HIDDEN + column[None, :]
        mask = used[:, None] & is_column[None, :]
        value = tl.load(rows_ptr + place, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_T, BLOCK_D)
        if WEIGHTED:
            weight = tl.load(weights_ptr + row, mask=used, other=0.0)  # (BLOCK_T,)
            value = tl.where(mask, weight[:, None] * value, 0.0)
        total += value
    place = token[:, None] * HIDDEN + column[None, :]
    mask = is_token[:, None] & is_column[None, :]
    if HAS_SHARED:
        total += tl.load(shared_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)  # (BLOCK_T, BLOCK_D)


def sum_rows(
    rows: Tensor,
    weights: Tensor | None,
    row_indices: Tensor,
    row_offsets: Tensor,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The sum of each token's rows, weighted where weights are given, plus shared and residual."""
    tokens, hidden = row_offsets.shape[0] - 1, rows.shape[1]
    out = rows.new_empty(tokens, hidden)
    block_d = block_size(hidden, largest=256)
    # 2 tokens a program keep 4 warps on 128-bit loads of 16-bit rows.
    block_t = max(1, 512 // block_d)
    launch(
        _sum_rows_kernel,
        (triton.cdiv(tokens, block_t), triton.cdiv(hidden, block_d)),
        rows.contiguous(),
        None if weights is None else weights.contiguous(),
        row_indices.contiguous(),
        row_offsets.contiguous(),
        None if shared is None else shared.contiguous(),
        None if residual is None else residual.contiguous(),
        out,
        tokens,
        HIDDEN=hidden,
        WEIGHTED=weights is not None,
        HAS_SHARED=shared is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=2,
    )
    return out


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=PARTS)
def _gather_kernel(
    x_ptr,
    token_indices_ptr,
    weights_ptr,
    values_ptr,
    rows_ptr,
    dweights_ptr,
    num_rows,
    HIDDEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """rows[r] = weights[r] * x[token of r]; dweights[r] = <x[token of r], values[r]> in fp32."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    is_row = row < num_rows
    token = tl.load(token_indices_ptr + row, mask=is_row, other=0).to(tl.int64)  # (BLOCK_R,)
    if WEIGHTED:
        weight = tl.load(weights_ptr + row, mask=is_row, other=0.0)  # (BLOCK_R,)
    if HAS_VALUES:
        product = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, HIDDEN, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
        mask = is_row[:, None] & (column < HIDDEN)[None, :]
        value = tl.load(x_ptr + token[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0)
        place = row[:, None] * HIDDEN + column[None, :]
        if HAS_VALUES:
            other = tl.load(values_ptr + place, mask=mask, other=0.0)  # (BLOCK_R, BLOCK_D)
            product += tl.sum(value.to(tl.float32) * other.to(tl.float32), axis=1)
        if WEIGHTED:
            value = (weight[:, None] * value.to(tl.float32)).to(value.dtype)
        tl.store(rows_ptr + place, value, mask=mask)  # (BLOCK_R, BLOCK_D)
    if HAS_VALUES:
        tl.store(dweights_ptr + row, product, mask=is_row)


def gather(
    x: Tensor, token_indices: Tensor, weights: Tensor | None, values: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows of x, weighted where weights are given, and their products with values where given."""
    num_rows, hidden = token_indices.shape[0], x.shape[1]
    rows = x.new_empty(num_rows, hidden)
    dweights = x.new_empty(0) if values is None else torch.empty_like(weights)  # type: ignore[arg-type]
    block_d = block_size(hidden, largest=512)
    block_r = max(1, 2048 // block_d)
    launch(
        _gather_kernel,
        (triton.cdiv(num_rows, block_r),),
        x.contiguous(),
        token_indices.contiguous(),
        None if weights is None else weights.contiguous(),
        None if values is None else values.contiguous(),
        rows,
        None if values is None else dweights,
        num_rows,
        HIDDEN=hidden,
        WEIGHTED=weights is not None,
        HAS_VALUES=values is not None,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return rows, dweights


def _dispatch(x: Tensor, token_indices: Tensor, row_indices: Tensor, row_offsets: Tensor) -> Tensor:
    return gather(x, token_indices, None, None)[0]


def _combine(
    rows: Tensor,
    weights: Tensor,
    shared: Tensor | None,
    residual: Tensor | None,
    token_indices: Tensor,
    row_indices: Tensor,
    row_offsets: Tensor,
) -> Tensor:
    return sum_rows(rows, weights, row_indices, row_offsets, shared, residual)


ops.gather.implement("triton", gather, DEVICE_TYPES)
ops.sum_rows.implement("triton", sum_rows, DEVICE_TYPES)
ops.dispatch.implement("triton", _dispatch, DEVICE_TYPES)
ops.combine.implement("triton", _combine, DEVICE_TYPES)
