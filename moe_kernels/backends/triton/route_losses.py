"""From the sums of token blocks to losses, counts and row starts.

Sums of a block are fp32; from there on they are added in fp64, always in the same order.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton.launch import PARTS, block_size, launch
from moe_kernels.backends.triton.token_block import SIZES, TokenBlocks
from moe_kernels.ops.pack import PlanIndices
from moe_kernels.ops.route import BALANCE_PER_GROUP, ENTROPY, MEAN_PROB

_BALANCE_PER_GROUP = tl.constexpr(BALANCE_PER_GROUP)
_ENTROPY = tl.constexpr(ENTROPY)
_MEAN_PROB = tl.constexpr(MEAN_PROB)

# Columns of a program of the group scan: several programs share the work of one long group.
_SCAN_COLUMNS = 32
_SCAN_ROWS = 64


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARTS)
def _group_scan_kernel(
    counts_ptr,
    sums_ptr,
    group_counts_ptr,
    group_sums_ptr,
    blocks_per_group,
    NUM_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Counts of a group's blocks become exclusive prefixes; totals of counts and loss sums."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # (COLUMNS,)
    is_expert = column < NUM_EXPERTS
    is_sum = column < NUM_EXPERTS + 2
    total = tl.zeros((COLUMNS,), tl.int32)
    loss = tl.zeros((COLUMNS,), tl.float64)
    for first in range(0, blocks_per_group, ROWS):
        row = first + tl.arange(0, ROWS)
        is_row = (row < blocks_per_group)[:, None]
        block = (group * blocks_per_group + row)[:, None]
        place = block * NUM_EXPERTS + column[None, :]
        mask = is_row & is_expert[None, :]
        counts = tl.load(counts_ptr + place, mask=mask, other=0)  # (ROWS, COLUMNS)
        before = tl.cumsum(counts, axis=0) - counts
        tl.store(counts_ptr + place, total[None, :] + before, mask=mask)  # (ROWS, COLUMNS)
        total += tl.sum(counts, axis=0)
        place = block * (NUM_EXPERTS + 2) + column[None, :]
        sums = tl.load(sums_ptr + place, mask=is_row & is_sum[None, :], other=0.0)
        loss += tl.sum(sums.to(tl.float64), axis=0)  # (COLUMNS,)
    tl.store(group_counts_ptr + group * NUM_EXPERTS + column, total, mask=is_expert)
    place = group * (NUM_EXPERTS + 2) + column
    tl.store(group_sums_ptr + place, loss.to(tl.float32), mask=is_sum)


@triton.jit
def _load_loss_sums(sums_ptr, row, is_row, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Some rows of sums (n, E + 2): of the distribution by expert; of z and entropy over rows."""
    expert = tl.arange(0, BLOCK_E)[None, :]
    start = row.to(tl.int64) * (NUM_EXPERTS + 2)
    mask = is_row[:, None] & (expert < NUM_EXPERTS)
    sums = tl.load(sums_ptr + start[:, None] + expert, mask=mask, other=0.0)  # (ROWS, BLOCK_E)
    z = tl.load(sums_ptr + start + NUM_EXPERTS, mask=is_row, other=0.0)  # (ROWS,)
    entropy = tl.load(sums_ptr + start + NUM_EXPERTS + 1, mask=is_row, other=0.0)  # (ROWS,)
    z = tl.sum(z.to(tl.float64), axis=0)
    return sums.to(tl.float64), z, tl.sum(entropy.to(tl.float64), axis=0)


@triton.jit
def _store_losses(
    load_balance_ptr,
    z_loss_ptr,
    terms_ptr,
    distribution,
    per_expert,
    per_group,
    z,
    entropy,
    num_tokens,
    num_groups,
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Losses and terms; per_group is the sum over groups and experts of rows times distribution."""
    expert = tl.arange(0, BLOCK_E)  # (BLOCK_E,)
    tokens = tl.maximum(num_tokens, 1).to(tl.float64)
    frequency = NUM_EXPERTS / tl.maximum(num_rows, 1).to(tl.float64)
    balance = tl.sum(distribution * per_expert.to(tl.float64), axis=0) * frequency / tokens
    tl.store(load_balance_ptr, balance.to(tl.float32))
    # f of one group is E / (R / G) n; the mean over groups takes the G back.
    per_group = per_group * frequency * num_groups / tokens
    tl.store(terms_ptr + _BALANCE_PER_GROUP, per_group.to(tl.float32))
    tl.store(terms_ptr + _ENTROPY, (entropy / tokens).to(tl.float32))
    tl.store(z_loss_ptr, (z / tokens).to(tl.float32))
    mean = (distribution / tokens).to(tl.float32)
    tl.store(terms_ptr + _MEAN_PROB + expert, mean, mask=expert < NUM_EXPERTS)  # (BLOCK_E,)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARTS)
def _token_choice_finish_kernel(
    group_sums_ptr,
    group_counts_ptr,
    group_starts_ptr,
    load_balance_ptr,
    z_loss_ptr,
    terms_ptr,
    row_offsets_ptr,
    expert_offsets_ptr,
    tokens_per_expert_ptr,
    histogram_ptr,
    num_tokens,
    num_groups,
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Each group's first row of each expert, counted from the expert's first; losses and counts."""
    expert = tl.arange(0, BLOCK_E)  # (BLOCK_E,)
    is_expert = expert < NUM_EXPERTS
    per_expert = tl.zeros((BLOCK_E,), tl.int32)
    distribution = tl.zeros((BLOCK_E,), tl.float64)
    per_group = tl.zeros((BLOCK_E,), tl.float64)
    z = tl.zeros((), tl.float64)
    entropy = tl.zeros((), tl.float64)
    for first in range(0, num_groups, ROWS):
        group = first + tl.arange(0, ROWS)
        is_group = group < num_groups
        place = group.to(tl.int64)[:, None] * NUM_EXPERTS + expert[None, :]
        mask = is_group[:, None] & is_expert[None, :]
        counts = tl.load(group_counts_ptr + place, mask=mask, other=0)  # (ROWS, BLOCK_E)
        before = tl.cumsum(counts, axis=0) - counts
        tl.store(group_starts_ptr + place, per_expert[None, :] + before, mask=mask)
        per_expert += tl.sum(counts, axis=0)
        sums, more_z, more_entropy = _load_loss_sums(
            group_sums_ptr, group, is_group, NUM_EXPERTS, BLOCK_E
        )
        distribution += tl.sum(sums, axis=0)
        per_group += tl.sum(sums * counts.to(tl.float64), axis=0)
        z += more_z
        entropy += more_entropy
    tl.store(tokens_per_expert_ptr + expert, per_expert, mask=is_expert)  # (BLOCK_E,)
    start = tl.cumsum(per_expert, axis=0) - per_expert
    tl.store(expert_offsets_ptr + expert, start, mask=is_expert)  # (BLOCK_E,)
    tl.store(expert_offsets_ptr + NUM_EXPERTS, num_rows)
    tl.store(row_offsets_ptr + tl.cast(num_tokens, tl.int64), num_rows)
    tl.store(histogram_ptr + expert, tl.where(expert == TOP_K, num_tokens, 0), mask=is_expert)
    tl.store(histogram_ptr + NUM_EXPERTS, num_tokens if TOP_K == NUM_EXPERTS else 0)
    _store_losses(
        load_balance_ptr,
        z_loss_ptr,
        terms_ptr,
        distribution,
        per_expert,
        tl.sum(per_group, axis=0),
        z,
        entropy,
        num_tokens,
        num_groups,
        num_rows,
        NUM_EXPERTS,
        BLOCK_E,
    )


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARTS)
def _expert_choice_finish_kernel(
    sums_ptr,
    held_ptr,
    load_balance_ptr,
    z_loss_ptr,
    terms_ptr,
    row_offsets_ptr,
    expert_offsets_ptr,
    tokens_per_expert_ptr,
    histogram_ptr,
    group_counts_ptr,
    num_tokens,
    num_groups,
    num_blocks,
    num_rows,
    capacity,
    NUM_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Losses and histogram from the sums of all blocks; every expert has the same counts."""
    expert = tl.arange(0, BLOCK_E)  # (BLOCK_E,)
    is_expert = expert < NUM_EXPERTS
    bin = tl.arange(0, BLOCK_H)  # (BLOCK_H,) 0 ... E experts, and more expert_offsets than experts
    is_bin = bin <= NUM_EXPERTS
    histogram = tl.zeros((BLOCK_H,), tl.int32)
    distribution = tl.zeros((BLOCK_E,), tl.float64)
    z = tl.zeros((), tl.float64)
    entropy = tl.zeros((), tl.float64)
    for first in range(0, num_blocks, ROWS):
        block = first + tl.arange(0, ROWS)
        is_block = block < num_blocks
        sums, more_z, more_entropy = _load_loss_sums(
            sums_ptr, block, is_block, NUM_EXPERTS, BLOCK_E
        )
        distribution += tl.sum(sums, axis=0)
        z += more_z
        entropy += more_entropy
        place = block.to(tl.int64)[:, None] * (NUM_EXPERTS + 1) + bin[None, :]
        mask = is_block[:, None] & is_bin[None, :]
        held = tl.load(held_ptr + place, mask=mask, other=0)  # (ROWS, BLOCK_H)
        histogram += tl.sum(held, axis=0)
    tl.store(histogram_ptr + bin, histogram, mask=is_bin)  # (BLOCK_H,)
    tl.store(expert_offsets_ptr + bin, bin * (num_groups * capacity), mask=is_bin)
    per_expert = tl.zeros((BLOCK_E,), tl.int32) + num_groups * capacity
    tl.store(tokens_per_expert_ptr + expert, per_expert, mask=is_expert)
    tl.store(row_offsets_ptr + tl.cast(num_tokens, tl.int64), num_rows)
    for first in range(0, num_groups, ROWS):
        group = first + tl.arange(0, ROWS)
        place = group.to(tl.int64)[:, None] * NUM_EXPERTS + expert[None, :]
        mask = (group < num_groups)[:, None] & is_expert[None, :]
        tl.store(group_counts_ptr + place, capacity, mask=mask)  # (ROWS, BLOCK_E)
    _store_losses(
        load_balance_ptr,
        z_loss_ptr,
        terms_ptr,
        distribution,
        per_expert,
        tl.sum(distribution, axis=0) * capacity,
        z,
        entropy,
        num_tokens,
        num_groups,
        num_rows,
        NUM_EXPERTS,
        BLOCK_E,
    )


def scan_groups(
    counts: Tensor, sums: Tensor, plan: PlanIndices, blocks: TokenBlocks, num_groups: int
) -> Tensor:
    """Turn each block's counts into prefixes inside its group; returns group sums (G, E + 2)."""
    num_experts = counts.shape[1]
    group_sums = sums.new_empty(num_groups, num_experts + 2)
    launch(
        _group_scan_kernel,
        (num_groups, triton.cdiv(num_experts + 2, _SCAN_COLUMNS)),
        counts,
        sums,
        plan.group_counts,
        group_sums,
        blocks.blocks_per_group,
        NUM_EXPERTS=num_experts,
        ROWS=_SCAN_ROWS,
        COLUMNS=_SCAN_COLUMNS,
    )
    return group_sums


def finish_token_choice(
    group_sums: Tensor,
    plan: PlanIndices,
    outputs: tuple[Tensor, Tensor, Tensor],
    num_tokens: int,
    num_groups: int,
    num_experts: int,
    top_k: int,
) -> Tensor:
    """Fill losses, terms and counts; returns the first row (G, E) of each group in its expert."""
    group_starts = plan.group_counts.new_empty(num_groups, num_experts)
    block_e = block_size(num_experts, smallest=4)
    launch(
        _token_choice_finish_kernel,
        (1,),
        group_sums,
        plan.group_counts,
        group_starts,
        *outputs,
        plan.row_offsets,
        plan.expert_offsets,
        plan.tokens_per_expert,
        plan.histogram,
        num_tokens,
        num_groups,
        num_tokens * top_k,
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        ROWS=_rows(block_e),
        BLOCK_E=block_e,
        num_warps=8,
    )
    return group_starts


def finish_expert_choice(
    sums: Tensor,
    held: Tensor,
    plan: PlanIndices,
    outputs: tuple[Tensor, Tensor, Tensor],
    num_tokens: int,
    num_groups: int,
    capacity: int,
) -> None:
    """Fill losses, terms and counts from the blocks' sums (n, E + 2) and counts (n, E + 1)."""
    num_experts = held.shape[1] - 1
    block_h = block_size(num_experts + 1, smallest=4)
    launch(
        _expert_choice_finish_kernel,
        (1,),
        sums,
        held,
        *outputs,
        plan.row_offsets,
        plan.expert_offsets,
        plan.tokens_per_expert,
        plan.histogram,
        plan.group_counts,
        num_tokens,
        num_groups,
        sums.shape[0],
        num_experts * num_groups * capacity,
        capacity,
        NUM_EXPERTS=num_experts,
        ROWS=_rows(block_h),
        BLOCK_E=block_size(num_experts, smallest=4),
        BLOCK_H=block_h,
        num_warps=8,
    )


def _rows(columns: int) -> int:
    """Rows that one program reads at a time: 4096 numbers, 16 a thread in 8 warps."""
    return max(4096 // columns, 4)
