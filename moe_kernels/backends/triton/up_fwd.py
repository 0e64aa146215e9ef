"""First product of the expert MLP: gather in the prologue, bias and activation in the epilogue."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton.activation_math import ACTIVATIONS, SWIGLU, gelu, swiglu
from moe_kernels.backends.triton.gemm_launch import GemmShape, launch_gemm
from moe_kernels.backends.triton.gemm_tiles import halves, locate, product, row_tiles, swizzle
from moe_kernels.backends.triton.launch import PARTS
from moe_kernels.ops.layout import stored


@triton.jit
def _epilogue(
    total,
    total_up,
    row,
    is_row,
    n,
    bias,
    h_tile,
    a_tile,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store h and act(h + bias) of these columns."""
    column = n + tl.arange(0, BLOCK_N)
    is_column = column < INNER
    mask = is_row[:, None] & is_column[None, :]
    place = row[:, None] * COLUMNS + column[None, :]
    # The activation reads h as it is stored, so that backward recomputes the very same a.
    h = total.to(h_tile.dtype.element_ty)
    tl.store(h_tile + place, h, mask=mask)  # (BLOCK_M, BLOCK_N)
    wide = h.to(tl.float32)
    if HAS_BIAS:
        wide += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == SWIGLU:
        h = total_up.to(h_tile.dtype.element_ty)
        tl.store(h_tile + INNER + place, h, mask=mask)  # (BLOCK_M, BLOCK_N)
        wide_up = h.to(tl.float32)
        if HAS_BIAS:
            bias_up = tl.load(bias + INNER + column, mask=is_column, other=0.0)
            wide_up += bias_up.to(tl.float32)[None, :]
        a = swiglu(wide, wide_up)
    else:
        a = gelu(wide, ACTIVATION)
    place = row[:, None] * INNER + column[None, :]
    tl.store(a_tile + place, a.to(a_tile.dtype.element_ty), mask=mask)  # (BLOCK_M, BLOCK_N)


@triton.jit
def _epilogue_by_halves(
    total,
    total_up,
    row,
    is_row,
    n,
    bias,
    h_tile,
    a_tile,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = halves(total, BLOCK_M, BLOCK_N)
    left_up, right_up = left, right
    if ACTIVATION == SWIGLU:
        left_up, right_up = halves(total_up, BLOCK_M, BLOCK_N)
    _epilogue(
        left, left_up, row, is_row, n, bias, h_tile, a_tile, INNER, COLUMNS, HAS_BIAS, ACTIVATION,
        HALF,
    )  # fmt: skip
    _epilogue(
        right, right_up, row, is_row, n + HALF, bias, h_tile, a_tile, INNER, COLUMNS, HAS_BIAS,
        ACTIVATION, HALF,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows_per_expert"], do_not_specialize_on_alignment=PARTS)
def _up_fwd_kernel(
    x_ptr,
    w_source,
    bias_ptr,
    token_indices_ptr,
    expert_offsets_ptr,
    h_ptr,
    a_ptr,
    rows_per_expert,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    """h[r] = w[e] @ x[token of r]; a[r] = act(h[r] + bias[e]); w (E, HIDDEN, ·) if W_TRANSPOSED."""
    COLUMNS: tl.constexpr = 2 * INNER if ACTIVATION == SWIGLU else INNER
    UP: tl.constexpr = INNER if ACTIVATION == SWIGLU else 0
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
        total, total_up = product(
            x_ptr, token.to(tl.int64), first, w_source, expert, n,
            IN=HIDDEN, OUT=INNER, W_OUT=COLUMNS, UP=UP, TRANSPOSED=not W_TRANSPOSED,
            A_DESCRIPTOR=False, W_DESCRIPTOR=W_DESCRIPTOR, PRECISION=PRECISION,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        # 64 bits for the tile's start, 32 inside it: half the registers.
        h_tile = h_ptr + start * COLUMNS
        a_tile = a_ptr + start * INNER
        bias = bias_ptr + expert.to(tl.int64) * COLUMNS if HAS_BIAS else bias_ptr
        if PARTS == 1:
            _epilogue(
                total, total_up, row, is_row, n, bias, h_tile, a_tile, INNER, COLUMNS, HAS_BIAS,
                ACTIVATION, BLOCK_N,
            )  # fmt: skip
        elif PARTS == 2:
            _epilogue_by_halves(
                total, total_up, row, is_row, n, bias, h_tile, a_tile, INNER, COLUMNS, HAS_BIAS,
                ACTIVATION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            left, right = halves(total, BLOCK_M, BLOCK_N)
            left_up, right_up = left, right
            if ACTIVATION == SWIGLU:
                left_up, right_up = halves(total_up, BLOCK_M, BLOCK_N)
            _epilogue_by_halves(
                left, left_up, row, is_row, n, bias, h_tile, a_tile, INNER, COLUMNS, HAS_BIAS,
                ACTIVATION, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip
            _epilogue_by_halves(
                right, right_up, row, is_row, n + BLOCK_N // 2, bias, h_tile, a_tile, INNER,
                COLUMNS, HAS_BIAS, ACTIVATION, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip


def up_fwd(
    x: Tensor,
    w_in: Tensor,
    bias_in: Tensor | None,
    token_indices: Tensor,
    expert_offsets: Tensor,
    rows_per_expert: int,
    inner: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """h (R, rows of w_in) before bias, and a = act(h + bias) (R, F); w_in in either layout."""
    rows, hidden = token_indices.shape[0], x.shape[1]
    h = x.new_empty(rows, w_in.shape[1])
    w_in, w_transposed = stored(w_in)
    a = x.new_empty(rows, inner)
    product = "up_fwd_gated" if activation == "swiglu" else "up_fwd"
    shape = GemmShape(product, rows, w_in.shape[0], rows_per_expert, hidden, inner)

    # Two accumulators leave fewer registers to the epilogue; those of fp32 products, which lie
    # otherwise, do not come apart cheaply.
    part = 32 if activation == "swiglu" and x.dtype != torch.float32 else 64

    def arguments(w_source: Any, _: Any) -> tuple[Any, ...]:
        return (x, w_source, bias_in, token_indices, expert_offsets, h, a, rows_per_expert)

    launch_gemm(
        _up_fwd_kernel,
        shape,
        arguments,
        x,
        w_in,
        transposed=not w_transposed,
        HIDDEN=hidden,
        INNER=inner,
        W_TRANSPOSED=w_transposed,
        HAS_BIAS=bias_in is not None,
        PARTS=min(4, max(1, shape.config(x, w_in).block_n // part)),
        ACTIVATION=ACTIVATIONS[activation],
    )
    return h, a
