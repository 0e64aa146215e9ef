"""What the grouped products share: which tile a program computes, and the product itself.

A tile belongs to one expert. For equal groups (expert choice) its expert follows from a division;
for ragged groups every program finds it in the cumulated tile counts of the experts, which it
computes from ``expert_offsets`` in registers: no map in memory, no launch, nothing asked of the
host, which only needs the bound ``max_row_tiles``.
"""

import triton
import triton.language as tl


def max_row_tiles(num_rows: int, num_experts: int, rows_per_expert: int, block_m: int) -> int:
    """Tiles of ``block_m`` rows that E groups can have: exact for equal groups, else a bound.

    Each ragged group has at most one tile that is not full.
    """
    if rows_per_expert:
        return num_experts * triton.cdiv(rows_per_expert, block_m)
    return min(num_rows // block_m + num_experts, num_rows)


@triton.jit
def row_tiles(
    expert_offsets_ptr,
    rows_per_expert,
    EXPERTS: tl.constexpr,
    EQUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """(BLOCK_E,) tiles of experts 0..e together, and the number of tiles of all."""
    expert = tl.arange(0, BLOCK_E)
    if EQUAL:
        each = tl.cdiv(rows_per_expert, BLOCK_M)
        return (expert + 1) * each, each * EXPERTS
    start = tl.load(expert_offsets_ptr + expert, mask=expert < EXPERTS, other=0)  # (BLOCK_E,)
    end = tl.load(expert_offsets_ptr + expert + 1, mask=expert < EXPERTS, other=0)  # (BLOCK_E,)
    tiles = tl.cdiv(end - start, BLOCK_M)
    return tl.cumsum(tiles, axis=0), tl.sum(tiles, axis=0)


@triton.jit
def locate(
    row_tile,
    last_tiles,
    expert_offsets_ptr,
    rows_per_expert,
    EXPERTS: tl.constexpr,
    EQUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Expert, first row and end of the expert's rows of a row tile."""
    if EQUAL:
        each = tl.cdiv(rows_per_expert, BLOCK_M)
        expert = row_tile // each
        start = expert * rows_per_expert
        return expert, start + (row_tile - expert * each) * BLOCK_M, start + rows_per_expert
    before = (last_tiles <= row_tile) & (tl.arange(0, BLOCK_E) < EXPERTS)
    expert = tl.sum(before.to(tl.int32), axis=0)
    first_tile = tl.max(tl.where(before, last_tiles, 0), axis=0)
    start = tl.load(expert_offsets_ptr + expert)
    end = tl.load(expert_offsets_ptr + expert + 1)
    return expert, start + (row_tile - first_tile) * BLOCK_M, end


@triton.jit
def swizzle(tile, num_row_tiles, num_column_tiles, GROUP_M: tl.constexpr):
    """Row tile and column tile; GROUP_M row tiles pass all columns together, to share L2."""
    group_size = GROUP_M * num_column_tiles
    group = tile // group_size
    first = group * GROUP_M
    height = tl.minimum(num_row_tiles - first, GROUP_M)
    inside = tile - group * group_size
    return first + inside % height, inside // height


@triton.jit
def product(
    a_source,
    a_row,
    first_row,
    w_source,
    expert,
    n,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    W_OUT: tl.constexpr,
    UP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    A_DESCRIPTOR: tl.constexpr,
    W_DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) fp32 of rows times an expert's matrix, from column n on.

    a_source (R or T, IN): pointer, read at rows a_row (BLOCK_M,), or descriptor, read from row
    first_row on. w_source: (E, W_OUT, IN) if TRANSPOSED (the product's column is the matrix's
    row, as of ``nn.Linear``'s), else (E, IN, W_OUT), as a pointer or as a descriptor of its 2-D
    view. UP > 0: also the product with what lies UP further along W_OUT, for the second half of
    SwiGLU.

    A descriptor's tile may run past the expert's matrix along the product's columns, which are not
    stored; along IN the launcher asks for whole tiles unless the tensor itself ends there.
    """
    k_range = tl.arange(0, BLOCK_K)
    n_range = n + tl.arange(0, BLOCK_N)
    if not A_DESCRIPTOR:
        a_tile = a_source + (a_row[:, None] * IN + k_range[None, :])  # (BLOCK_M, BLOCK_K)
    if not W_DESCRIPTOR:
        matrix = w_source + expert.to(tl.int64) * (W_OUT * IN)
        if TRANSPOSED:  # (BLOCK_K, BLOCK_N)
            w_tile = matrix + (n_range[None, :] * IN + k_range[:, None])
        else:
            w_tile = matrix + (k_range[:, None] * W_OUT + n_range[None, :])
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if UP > 0:
        total_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, IN, BLOCK_K):
        if A_DESCRIPTOR:
            a = a_source.load([first_row, k])  # (BLOCK_M, BLOCK_K)
        elif IN % BLOCK_K == 0:
            a = tl.load(a_tile)
        else:
            a = tl.load(a_tile, mask=(k_range < IN - k)[None, :], other=0.0)
        if W_DESCRIPTOR and TRANSPOSED:
            w = w_source.load([expert * W_OUT + n, k]).T  # (BLOCK_K, BLOCK_N)
        elif W_DESCRIPTOR:
            w = w_source.load([expert * IN + k, n])
        elif IN % BLOCK_K == 0 and OUT % BLOCK_N == 0:
            w = tl.load(w_tile)
        else:
            w_mask = (k_range < IN - k)[:, None] & (n_range < OUT)[None, :]
            w = tl.load(w_tile, mask=w_mask, other=0.0)
        total = tl.dot(a, w, total, input_precision=PRECISION)
        if UP > 0:
            if W_DESCRIPTOR and TRANSPOSED:
                w = w_source.load([expert * W_OUT + UP + n, k]).T
            elif W_DESCRIPTOR:
                w = w_source.load([expert * IN + k, UP + n])
            elif IN % BLOCK_K == 0 and OUT % BLOCK_N == 0:
                w = tl.load(w_tile + (UP * IN if TRANSPOSED else UP))
            else:
                w = tl.load(w_tile + (UP * IN if TRANSPOSED else UP), mask=w_mask, other=0.0)
            total_up = tl.dot(a, w, total_up, input_precision=PRECISION)
        if not A_DESCRIPTOR:
            a_tile += BLOCK_K
        if not W_DESCRIPTOR:
            w_tile += BLOCK_K if TRANSPOSED else BLOCK_K * W_OUT
    if UP > 0:
        return total, total_up
    return total, total


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns.

    An epilogue that works on halves holds half as many temporaries in registers.
    """
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
