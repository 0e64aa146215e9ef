"""Plain grouped product of rows in expert order: the second product, d(rows), and grouped GEMM."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton.gemm_launch import GemmShape, launch_gemm
from moe_kernels.backends.triton.gemm_tiles import locate, product, row_tiles, swizzle
from moe_kernels.backends.triton.launch import PARTS


@triton.jit(do_not_specialize=["rows_per_expert"], do_not_specialize_on_alignment=PARTS)
def _rows_gemm_kernel(
    a_source,
    w_source,
    bias_ptr,
    expert_offsets_ptr,
    out_ptr,
    rows_per_expert,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    A_DESCRIPTOR: tl.constexpr,
    EXPERTS: tl.constexpr,
    EQUAL: tl.constexpr,
    W_DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out[r] = w[e] @ a[r] + bias[e]; without TRANSPOSED out[r] = w[e]^T @ a[r]."""
    last_tiles, num_row_tiles = row_tiles(
        expert_offsets_ptr, rows_per_expert, EXPERTS, EQUAL, BLOCK_M, BLOCK_E
    )
    num_column_tiles = tl.cdiv(OUT, BLOCK_N)
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
        # Beyond the end the first row is read again: in bounds, and not stored.
        total, _ = product(
            a_source, start + tl.where(is_row, row, 0), first, w_source, expert, n,
            IN=IN, OUT=OUT, W_OUT=OUT, UP=0, TRANSPOSED=TRANSPOSED,
            A_DESCRIPTOR=A_DESCRIPTOR, W_DESCRIPTOR=W_DESCRIPTOR, PRECISION=PRECISION,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        column = n + tl.arange(0, BLOCK_N)
        is_column = column < OUT
        if HAS_BIAS:
            bias = bias_ptr + expert.to(tl.int64) * OUT + column
            total += tl.load(bias, mask=is_column, other=0.0).to(tl.float32)[None, :]
        place = row[:, None] * OUT + column[None, :]
        out_tile = out_ptr + start * OUT
        mask = is_row[:, None] & is_column[None, :]
        tl.store(out_tile + place, total.to(out_ptr.dtype.element_ty), mask=mask)  # (M, N)


def rows_gemm(
    rows: Tensor,
    w: Tensor,
    expert_offsets: Tensor,
    rows_per_expert: int,
    *,
    transposed: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """out[r] = w[e] @ rows[r] + bias[e] with w (E, O, I), or w[e]^T @ rows[r] with w (E, I, O)."""
    out_features = w.shape[1] if transposed else w.shape[2]
    out = rows.new_empty(rows.shape[0], out_features)
    op = "rows_gemm" if transposed else "rows_gemm_nn"
    experts, in_features = w.shape[0], rows.shape[1]
    shape = GemmShape(op, rows.shape[0], experts, rows_per_expert, in_features, out_features)

    def arguments(w_source: Any, a_source: Any) -> tuple[Any, ...]:
        return (a_source, w_source, bias, expert_offsets, out, rows_per_expert)

    launch_gemm(
        _rows_gemm_kernel,
        shape,
        arguments,
        rows,
        w,
        transposed=transposed,
        rows_in_order=True,
        IN=in_features,
        OUT=out_features,
        HAS_BIAS=bias is not None,
        TRANSPOSED=transposed,
    )
    return out
