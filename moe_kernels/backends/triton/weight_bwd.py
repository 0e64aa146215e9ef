"""Weight and bias gradients: products along the rows of each expert, gathered where needed.

Every expert's gradient is written, with zeros where it has no rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton.configs import choose, precision
from moe_kernels.backends.triton.gemm_launch import describable
from moe_kernels.backends.triton.gemm_tiles import swizzle
from moe_kernels.backends.triton.launch import PARTS, launch, target_of


@triton.jit(do_not_specialize=["rows_per_expert"], do_not_specialize_on_alignment=PARTS)
def _weight_bwd_kernel(
    p_ptr,
    q_ptr,
    token_indices_ptr,
    expert_offsets_ptr,
    dw_ptr,
    rows_per_expert,
    P_COLUMNS: tl.constexpr,
    Q_COLUMNS: tl.constexpr,
    GATHER_P: tl.constexpr,
    GATHER_Q: tl.constexpr,
    EQUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dw[e] = sum over its rows r of p[r]^T q[r]; p or q may be read by the token of r."""
    expert = tl.program_id(1)
    m_tiles: tl.constexpr = (P_COLUMNS + BLOCK_M - 1) // BLOCK_M
    n_tiles: tl.constexpr = (Q_COLUMNS + BLOCK_N - 1) // BLOCK_N
    m_tile, n_tile = swizzle(tl.program_id(0), m_tiles, n_tiles, GROUP_M)
    if EQUAL:
        start = expert * rows_per_expert
        end = start + rows_per_expert
    else:
        start = tl.load(expert_offsets_ptr + expert)
        end = tl.load(expert_offsets_ptr + expert + 1)
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K).to(tl.int64)
        is_row = row < end
        p_row, q_row = row, row
        if GATHER_P or GATHER_Q:
            token = tl.load(token_indices_ptr + row, mask=is_row, other=0).to(tl.int64)
            if GATHER_P:
                p_row = token
            if GATHER_Q:
                q_row = token
        p_mask = is_row[:, None]
        q_mask = is_row[:, None]
        if P_COLUMNS % BLOCK_M != 0:
            p_mask = p_mask & (m < P_COLUMNS)[None, :]
        if Q_COLUMNS % BLOCK_N != 0:
            q_mask = q_mask & (n < Q_COLUMNS)[None, :]
        p = tl.load(
            p_ptr + (p_row[:, None] * P_COLUMNS + m[None, :]), mask=p_mask, other=0.0
        )  # (BLOCK_K, BLOCK_M)
        q = tl.load(
            q_ptr + (q_row[:, None] * Q_COLUMNS + n[None, :]), mask=q_mask, other=0.0
        )  # (BLOCK_K, BLOCK_N)
        total = tl.dot(p.T, q, total, input_precision=PRECISION)
    matrix = dw_ptr + expert.to(tl.int64) * (P_COLUMNS * Q_COLUMNS)
    place = m[:, None] * Q_COLUMNS + n[None, :]
    mask = (m < P_COLUMNS)[:, None] & (n < Q_COLUMNS)[None, :]
    tl.store(matrix + place, total.to(dw_ptr.dtype.element_ty), mask=mask)  # (BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["rows_per_expert"], do_not_specialize_on_alignment=PARTS)
def _bias_bwd_kernel(
    rows_ptr,
    weights_ptr,
    token_indices_ptr,
    expert_offsets_ptr,
    dbias_ptr,
    rows_per_expert,
    COLUMNS: tl.constexpr,
    GATHER: tl.constexpr,
    EQUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dbias[e] = sum of its rows; with GATHER the rows of their tokens, times their weights."""
    expert = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = column < COLUMNS
    if EQUAL:
        start = expert * rows_per_expert
        end = start + rows_per_expert
    else:
        start = tl.load(expert_offsets_ptr + expert)
        end = tl.load(expert_offsets_ptr + expert + 1)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for first in range(start, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R).to(tl.int64)
        is_row = row < end
        source = row
        if GATHER:
            source = tl.load(token_indices_ptr + row, mask=is_row, other=0).to(tl.int64)
        mask = is_row[:, None] & is_column[None, :]
        value = tl.load(
            rows_ptr + (source[:, None] * COLUMNS + column[None, :]), mask=mask, other=0.0
        ).to(tl.float32)  # (BLOCK_R, BLOCK_D)
        if GATHER:
            value *= tl.load(weights_ptr + row, mask=is_row, other=0.0)[:, None]
        total += value
    sums = tl.sum(total, axis=0).to(dbias_ptr.dtype.element_ty)  # (BLOCK_D,)
    tl.store(dbias_ptr + expert.to(tl.int64) * COLUMNS + column, sums, mask=is_column)


def weight_bwd(
    p: Tensor,
    q: Tensor,
    expert_offsets: Tensor,
    rows_per_expert: int,
    *,
    token_indices: Tensor | None = None,
    gather: str = "none",
    transposed: bool = False,
) -> Tensor:
    """dw (E, columns of p, columns of q) in the dtype of p.

    Args:
        p, q: (R, M) and (R, N) in expert order; the one that ``gather`` names, ``"p"`` or ``"q"``,
            is (T, ·) and read at ``token_indices`` (R,).
        expert_offsets: (E + 1,) int32.
        rows_per_expert: for equal groups, else 0.
        transposed: whether dw is to lie in memory as (E, columns of q, columns of p).
    """
    if transposed:
        p, q, gather = q, p, {"p": "q", "q": "p"}.get(gather, gather)
    experts = expert_offsets.shape[0] - 1
    dw = p.new_empty(experts, p.shape[1], q.shape[1])
    rows = q.shape[0] if gather == "p" else p.shape[0]
    target = target_of(p)
    aligned = describable(p) and describable(q)
    widths = (p.shape[1], q.shape[1])
    config = choose("weight_bwd", target, p.dtype, *widths, rows // experts, aligned)
    tiles = triton.cdiv(p.shape[1], config.block_m) * triton.cdiv(q.shape[1], config.block_n)
    launch(
        _weight_bwd_kernel,
        (tiles, experts),
        p,
        q,
        token_indices,
        expert_offsets,
        dw,
        rows_per_expert,
        P_COLUMNS=p.shape[1],
        Q_COLUMNS=q.shape[1],
        GATHER_P=gather == "p",
        GATHER_Q=gather == "q",
        EQUAL=rows_per_expert > 0,
        PRECISION=precision(p, target.arch),
        GROUP_M=config.group_m,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dw.transpose(1, 2) if transposed else dw


def bias_bwd(
    rows: Tensor,
    like: Tensor,
    expert_offsets: Tensor,
    rows_per_expert: int,
    *,
    weights: Tensor | None = None,
    token_indices: Tensor | None = None,
) -> Tensor:
    """Sums of each expert's rows, as ``like`` (E, columns); gathered and weighted if given."""
    dbias = torch.empty_like(like, memory_format=torch.contiguous_format)
    columns = rows.shape[1]
    launch(
        _bias_bwd_kernel,
        (triton.cdiv(columns, 64), like.shape[0]),
        rows,
        weights,
        token_indices,
        expert_offsets,
        dbias,
        rows_per_expert,
        COLUMNS=columns,
        GATHER=token_indices is not None,
        EQUAL=rows_per_expert > 0,
        BLOCK_R=32,
        BLOCK_D=64,
        num_warps=4,
    )
    return dbias
