"""d(pre-activation): gather of d(out), product, activation backward and gate gradient at once."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton.activation_math import (
    ACTIVATIONS,
    SWIGLU,
    gelu_with_slope,
    swiglu_with_slopes,
)
from moe_kernels.backends.triton.gemm_launch import GemmShape, launch_gemm
from moe_kernels.backends.triton.gemm_tiles import halves, locate, product, row_tiles, swizzle
from moe_kernels.backends.triton.launch import PARTS, block_size, launch
from moe_kernels.ops.layout import stored


@triton.jit
def _epilogue(
    da,
    row,
    is_row,
    weight,
    n,
    h_tile,
    bias,
    dh_tile,
    a_tile,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_A: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store dh and weights * a of these columns; return <da, a> of each row over them."""
    column = n + tl.arange(0, BLOCK_N)
    is_column = column < INNER
    mask = is_row[:, None] & is_column[None, :]
    place = row[:, None] * COLUMNS + column[None, :]
    h = tl.load(h_tile + place, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    if HAS_BIAS:
        h += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == SWIGLU:
        up = tl.load(h_tile + INNER + place, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            bias_up = tl.load(bias + INNER + column, mask=is_column, other=0.0)
            up += bias_up.to(tl.float32)[None, :]
        a, by_gate, by_up = swiglu_with_slopes(h, up)
        dup = weight[:, None] * da * by_up
        tl.store(dh_tile + INNER + place, dup.to(dh_tile.dtype.element_ty), mask=mask)
        dh = weight[:, None] * da * by_gate
    else:
        a, slope = gelu_with_slope(h, ACTIVATION)
        dh = weight[:, None] * da * slope
    tl.store(dh_tile + place, dh.to(dh_tile.dtype.element_ty), mask=mask)  # (BLOCK_M, BLOCK_N)
    if STORE_A:
        place = row[:, None] * INNER + column[None, :]
        scaled = (weight[:, None] * a).to(a_tile.dtype.element_ty)
        tl.store(a_tile + place, scaled, mask=mask)  # (BLOCK_M, BLOCK_N)
    return tl.sum(tl.where(mask, da * a, 0.0), axis=1)


@triton.jit(do_not_specialize=["rows_per_expert"], do_not_specialize_on_alignment=PARTS)
def _down_bwd_kernel(
    dout_ptr,
    w_source,
    h_ptr,
    bias_ptr,
    weights_ptr,
    token_indices_ptr,
    expert_offsets_ptr,
    dh_ptr,
    a_ptr,
    partial_ptr,
    rows_per_expert,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_A: tl.constexpr,
    GATE_GRADIENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXPERTS: tl.constexpr,
    EQUAL: tl.constexpr,
    W_DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """With da'[r] = w[e]^T @ dout[token of r] and a = act(h + bias) recomputed:

    dh[r] = weights[r] * da'[r] * act'; a[r] scaled by weights[r], for dw; and the part of
    d(weights)[r] = <da'[r], a[r]> that lies in this tile's columns. w is (E, HIDDEN, INNER), or
    (E, INNER, HIDDEN) if W_TRANSPOSED.
    """
    COLUMNS: tl.constexpr = 2 * INNER if ACTIVATION == SWIGLU else INNER
    last_tiles, num_row_tiles = row_tiles(
        expert_offsets_ptr, rows_per_expert, EXPERTS, EQUAL, BLOCK_M, BLOCK_E
    )
    num_column_tiles = tl.cdiv(INNER, BLOCK_N)
    for tile in range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        row_tile, n_tile = swizzle(tile, num_row_tiles, num_column_tiles, GROUP_M)
        expert, first, end = locate(
            row_tile, last_tiles, expert_offsets_ptr, rows_per_expert, EXPERTS, EQUAL, BLOCK_M,
            BLOCK_E,
        )  # fmt: skip
        n = n_tile * BLOCK_N
        start = first.to(tl.int64)
        row = tl.arange(0, BLOCK_M)  # from `first` on
        is_row = row < end - first
        token = tl.load(token_indices_ptr + start + row, mask=is_row, other=0)  # (BLOCK_M,)
        da, _ = product(
            dout_ptr, token.to(tl.int64), first, w_source, expert, n,
            IN=HIDDEN, OUT=INNER, W_OUT=INNER, UP=0, TRANSPOSED=W_TRANSPOSED,
            A_DESCRIPTOR=False, W_DESCRIPTOR=W_DESCRIPTOR, PRECISION=PRECISION,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        weight = tl.load(weights_ptr + start + row, mask=is_row, other=0.0)  # (BLOCK_M,)
        # 64 bits for the tile's start, 32 inside it: half the registers.
        h_tile = h_ptr + start * COLUMNS
        dh_tile = dh_ptr + start * COLUMNS
        a_tile = a_ptr + start * INNER if STORE_A else a_ptr
        bias = bias_ptr + expert.to(tl.int64) * COLUMNS if HAS_BIAS else bias_ptr
        if PARTS == 1:
            part = _epilogue(
                da, row, is_row, weight, n, h_tile, bias, dh_tile, a_tile, INNER, COLUMNS,
                HAS_BIAS, STORE_A, ACTIVATION, BLOCK_N,
            )  # fmt: skip
        else:
            left, right = halves(da, BLOCK_M, BLOCK_N)
            part = _epilogue(
                left, row, is_row, weight, n, h_tile, bias, dh_tile, a_tile, INNER, COLUMNS,
                HAS_BIAS, STORE_A, ACTIVATION, BLOCK_N // 2,
            )  # fmt: skip
            part += _epilogue(
                right, row, is_row, weight, n + BLOCK_N // 2, h_tile, bias, dh_tile, a_tile,
                INNER, COLUMNS, HAS_BIAS, STORE_A, ACTIVATION, BLOCK_N // 2,
            )  # fmt: skip
        if GATE_GRADIENT:
            place = (start + row) * num_column_tiles + n_tile
            tl.store(partial_ptr + place, part, mask=is_row)  # (BLOCK_M,)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=PARTS)
def _gate_gradient_kernel(
    partial_ptr,
    dout_ptr,
    bias_ptr,
    token_indices_ptr,
    expert_offsets_ptr,
    dweights_ptr,
    num_rows,
    PARTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dweights[r] = the row's parts in a fixed order, + <dout[token of r], bias_out[e]>."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = row < num_rows
    part = tl.arange(0, BLOCK_P)
    is_part = is_row[:, None] & (part < PARTS)[None, :]
    parts = tl.load(partial_ptr + row[:, None] * PARTS + part[None, :], mask=is_part, other=0.0)
    total = tl.sum(parts, axis=1)  # (BLOCK_R,)
    if HAS_BIAS:
        token = tl.load(token_indices_ptr + row, mask=is_row, other=0).to(tl.int64)  # (BLOCK_R,)
        expert = tl.arange(0, BLOCK_E)
        ends = tl.load(expert_offsets_ptr + expert + 1, mask=expert < EXPERTS, other=2147483647)
        before = (ends[None, :] <= row[:, None]).to(tl.int32)  # (BLOCK_R, BLOCK_E)
        own = tl.where(is_row, tl.sum(before, axis=1), 0).to(tl.int64)
        for first in range(0, HIDDEN, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            mask = is_row[:, None] & (column < HIDDEN)[None, :]
            dout = tl.load(
                dout_ptr + token[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0
            )  # (BLOCK_R, BLOCK_D)
            bias = tl.load(
                bias_ptr + own[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0
            )  # (BLOCK_R, BLOCK_D)
            total += tl.sum(dout.to(tl.float32) * bias.to(tl.float32), axis=1)
    tl.store(dweights_ptr + row, total, mask=is_row)


def down_bwd(
    dout: Tensor,
    h: Tensor,
    weights: Tensor,
    w_out: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    token_indices: Tensor,
    expert_offsets: Tensor,
    rows_per_expert: int,
    activation: str,
    *,
    store_a: bool,
    gate_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dh (R, rows of w_in); weights * a (R, F) if asked for; d(weights) (R,) if asked for.

    w_out (E, D, F) may have either layout.
    """
    rows, (experts, hidden, inner) = h.shape[0], w_out.shape
    w_out, w_transposed = stored(w_out)
    dh = h.new_empty(h.shape)
    a = h.new_empty(rows, inner) if store_a else None
    shape = GemmShape("down_bwd", rows, experts, rows_per_expert, hidden, inner)
    config = shape.config(dout, w_out)
    parts = triton.cdiv(inner, config.block_n)
    partial = weights.new_empty(rows, parts) if gate_gradient else None

    def arguments(w_source: Any, _: Any) -> tuple[Any, ...]:
        indices = (token_indices, expert_offsets)
        return (*(dout, w_source, h, bias_in, weights, *indices, dh, a, partial, rows_per_expert),)

    launch_gemm(
        _down_bwd_kernel,
        shape,
        arguments,
        dout,
        w_out,
        transposed=w_transposed,
        HIDDEN=hidden,
        INNER=inner,
        W_TRANSPOSED=w_transposed,
        HAS_BIAS=bias_in is not None,
        STORE_A=store_a,
        GATE_GRADIENT=gate_gradient,
        PARTS=2 if config.block_n >= 128 else 1,
        ACTIVATION=ACTIVATIONS[activation],
    )
    if partial is None:
        return dh, a, None
    dweights = weights.new_empty(rows)
    launch(
        _gate_gradient_kernel,
        (triton.cdiv(rows, 32),),
        partial,
        dout,
        bias_out,
        token_indices,
        expert_offsets,
        dweights,
        rows,
        PARTS=parts,
        HIDDEN=hidden,
        HAS_BIAS=bias_out is not None,
        EXPERTS=experts,
        BLOCK_R=32,
        BLOCK_P=block_size(parts),
        BLOCK_D=block_size(hidden, largest=128),
        BLOCK_E=block_size(experts),
        num_warps=4,
    )
    return dh, a, dweights
