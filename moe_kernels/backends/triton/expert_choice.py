"""Expert choice: every expert takes its C best tokens of each group, in token order.

Four launches for pools that one program can hold: affinities (G, E, S) and the loss sums of each
block; selection, a program for each expert and group; each token's list of rows; the losses.
Longer pools are selected by ``expert_choice_long``.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton import expert_choice_long
from moe_kernels.backends.triton.launch import DEVICE_TYPES, PARTS, block_size, launch, target_of
from moe_kernels.backends.triton.route_losses import finish_expert_choice
from moe_kernels.backends.triton.token_block import (
    SIZES,
    TokenBlocks,
    block_tokens,
    choose,
    cut,
    load_logits,
    ordered_bits,
    positive_or_one,
    ranking_key,
    routing_block,
    store_loss_sums,
    token_blocks,
)
from moe_kernels.checks import check_finite_logits
from moe_kernels.ops import route as ops
from moe_kernels.ops.pack import PlanIndices

# Longest pool that one program selects from. Counts of it fit 15 bits, so that three fit one int64.
LONGEST_BLOCK = 16384
_CHUNK = 2048  # tokens that it places at a time


@triton.jit(do_not_specialize=SIZES)
def _expert_choice_affinity_kernel(
    logits_ptr,
    affinity_ptr,
    sums_ptr,
    group_size,
    blocks_per_group,
    AFFINITY: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Affinities of the block, transposed to (G, E, S), and its loss sums."""
    group, place, token, is_token = block_tokens(group_size, blocks_per_group, BLOCK_T)
    logits = load_logits(logits_ptr, token, is_token, NUM_EXPERTS, BLOCK_E)  # (BLOCK_T, BLOCK_E)
    affinity, _, distribution, entropy, logsumexp = routing_block(
        logits, AFFINITY, NUM_EXPERTS, BLOCK_E
    )
    store_loss_sums(sums_ptr, is_token, distribution, entropy, logsumexp, NUM_EXPERTS, BLOCK_E)
    expert = tl.arange(0, BLOCK_E)[None, :]
    pool = group.to(tl.int64) * NUM_EXPERTS + expert
    mask = is_token[:, None] & (expert < NUM_EXPERTS)
    tl.store(affinity_ptr + pool * group_size + place[:, None], affinity, mask=mask)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARTS)
def _expert_choice_select_kernel(
    affinity_ptr,
    slots_ptr,
    routing_weights_ptr,
    token_indices_ptr,
    scale,
    num_groups,
    group_size,
    capacity,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The rows of one expert and group; slots (G, E, S) = 2 * chosen tokens before + chosen."""
    pool = tl.program_id(0)
    group = pool // NUM_EXPERTS
    expert = pool % NUM_EXPERTS
    affinity_ptr += pool.to(tl.int64) * group_size
    slots_ptr += pool.to(tl.int64) * group_size
    token = tl.arange(0, BLOCK_S)
    in_pool = token < group_size
    all_affinities = tl.load(affinity_ptr + token, mask=in_pool, other=0.0)  # (BLOCK_S,)
    keys = tl.where(in_pool, ordered_bits(ranking_key(all_affinities)), -(1 << 31))

    # The C-th largest key, two bits a pass: the largest number that C keys are not below.
    threshold = tl.full((), -(1 << 31), tl.int64)
    for step in range(16):
        unit = tl.full((), 1, tl.int64) << (30 - 2 * step)
        one = (keys >= (threshold + unit).to(tl.int32)).to(tl.int64)
        two = (keys >= (threshold + 2 * unit).to(tl.int32)).to(tl.int64)
        three = (keys >= (threshold + 3 * unit).to(tl.int32)).to(tl.int64)
        counts = tl.sum(one + (two << 16) + (three << 32), axis=0)
        digit = ((counts & 0xFFFF) >= capacity).to(tl.int64)
        digit += (((counts >> 16) & 0xFFFF) >= capacity).to(tl.int64)
        digit += ((counts >> 32) >= capacity).to(tl.int64)
        threshold += digit * unit
    threshold = tl.minimum(threshold, (1 << 31) - 1).to(tl.int32)
    needed = capacity - tl.sum((keys > threshold).to(tl.int32), axis=0)  # of the equal ones

    # In chunks, because scans and addresses of the whole pool do not fit the registers.
    first_row = (expert * num_groups + group).to(tl.int64) * capacity
    greater_before = tl.full((), 0, tl.int32)
    equal_before = tl.full((), 0, tl.int32)
    for first in range(0, group_size, CHUNK):
        place = first + tl.arange(0, CHUNK)
        is_token = place < group_size
        affinity = tl.load(affinity_ptr + place, mask=is_token, other=0.0)  # (CHUNK,)
        key = ordered_bits(ranking_key(affinity))
        chosen, position, greater_before, equal_before = choose(
            is_token & (key > threshold),
            is_token & (key == threshold),
            greater_before,
            equal_before,
            needed,
        )
        tl.store(slots_ptr + place, position * 2 + chosen.to(tl.int32), mask=is_token)
        row = first_row + position
        tl.store(token_indices_ptr + row, group * group_size + place, mask=chosen)  # (CHUNK,)
        tl.store(routing_weights_ptr + row, affinity * scale, mask=chosen)  # (CHUNK,)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARTS)
def _expert_choice_place_kernel(
    affinity_ptr,
    slots_ptr,
    routing_weights_ptr,
    held_ptr,
    row_indices_ptr,
    row_experts_ptr,
    row_offsets_ptr,
    scale,
    num_groups,
    group_size,
    blocks_per_group,
    capacity,
    NUM_EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Rows of each token, by rising expert; how many tokens of the block 0, ..., E experts took."""
    group, place, token, is_token = block_tokens(group_size, blocks_per_group, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)[None, :]
    pool = group.to(tl.int64) * NUM_EXPERTS + expert
    in_pool = pool * group_size + place[:, None]
    mask = is_token[:, None] & (expert < NUM_EXPERTS)
    slots = tl.load(slots_ptr + in_pool, mask=mask, other=0)  # (BLOCK_T, BLOCK_E)
    chosen = slots & 1
    position = slots >> 1
    # A group has exactly E·C rows: a token's list starts after all that earlier tokens were given.
    offset = group * (NUM_EXPERTS * capacity) + tl.sum(position, axis=1)  # (BLOCK_T,)
    tl.store(row_offsets_ptr + token, offset, mask=is_token)
    row = (expert * num_groups + group) * capacity + position  # (BLOCK_T, BLOCK_E)
    slot = offset[:, None] + tl.cumsum(chosen, axis=1) - chosen  # (BLOCK_T, BLOCK_E)
    tl.store(row_indices_ptr + slot, row, mask=chosen > 0)
    tl.store(row_experts_ptr + slot, expert + tl.zeros_like(slot), mask=chosen > 0)
    if PER_TOKEN:
        affinity = tl.load(affinity_ptr + in_pool, mask=chosen > 0, other=0.0)  # (BLOCK_T, BLOCK_E)
        divisor = positive_or_one(tl.sum(affinity, axis=1))[:, None]
        tl.store(routing_weights_ptr + row, affinity / divisor * scale, mask=chosen > 0)

    bin = tl.arange(0, BLOCK_H)
    same = (tl.sum(chosen, axis=1)[:, None] == bin[None, :]) & is_token[:, None]
    block = tl.program_id(0).to(tl.int64)
    held = tl.sum(same.to(tl.int32), axis=0)  # (BLOCK_H,)
    tl.store(held_ptr + block * (NUM_EXPERTS + 1) + bin, held, mask=bin <= NUM_EXPERTS)


def _select(
    affinities: Tensor,
    slots: Tensor,
    weights: Tensor,
    plan: PlanIndices,
    scale: float,
    capacity: int,
) -> None:
    groups, experts, size = affinities.shape
    block_s = block_size(size, smallest=64)
    warps = 4 if block_s <= 1024 else max(block_s // 512, 8)
    if target_of(affinities).arch.startswith("gfx"):  # 64 threads a warp, at most 1024 a program
        warps = min(warps, 16)
    launch(
        _expert_choice_select_kernel,
        (groups * experts if size else 0,),
        affinities,
        slots,
        weights,
        plan.token_indices,
        scale,
        groups,
        size,
        capacity,
        NUM_EXPERTS=experts,
        BLOCK_S=block_s,
        CHUNK=min(block_s, _CHUNK),
        num_warps=warps,
    )


def _place(
    affinities: Tensor,
    slots: Tensor,
    weights: Tensor,
    plan: PlanIndices,
    blocks: TokenBlocks,
    scale: float,
    capacity: int,
    per_token: bool,
) -> Tensor:
    """Fill the token -> rows lists; returns each block's counts of tokens that n experts took."""
    groups, experts, size = affinities.shape
    held = slots.new_empty(blocks.num_blocks, experts + 1)
    launch(
        _expert_choice_place_kernel,
        (blocks.num_blocks,),
        affinities,
        slots,
        weights,
        held,
        plan.row_indices,
        plan.row_experts,
        plan.row_offsets,
        scale,
        groups,
        size,
        blocks.blocks_per_group,
        capacity,
        NUM_EXPERTS=experts,
        PER_TOKEN=per_token,
        BLOCK_T=blocks.block_t,
        BLOCK_E=blocks.block_e,
        BLOCK_H=block_size(experts + 1, smallest=4),
        num_warps=8,
    )
    return held


def _expert_choice(
    router_logits: Tensor,
    capacity: int,
    affinity: str,
    per_token: bool,
    scale: float,
    num_groups: int,
    check_finite: bool,
) -> ops.RouteOutputs:
    logits = router_logits.contiguous()
    if check_finite:
        check_finite_logits(logits)
    tokens, experts = logits.shape
    rows = experts * num_groups * capacity
    outputs = ops.empty_outputs(logits, num_groups, rows, 0)
    weights, load_balance, z_loss, terms, packed = outputs
    plan = cut(packed, logits, num_groups, rows, 0)
    blocks = token_blocks(tokens, experts, num_groups)
    affinities = logits.new_empty(num_groups, experts, blocks.group_size)
    slots = packed.new_empty(affinities.shape)
    sums = logits.new_empty(blocks.num_blocks, experts + 2)
    launch(
        _expert_choice_affinity_kernel,
        (blocks.num_blocks,),
        logits,
        affinities,
        sums,
        blocks.group_size,
        blocks.blocks_per_group,
        AFFINITY=affinity,
        NUM_EXPERTS=experts,
        BLOCK_T=blocks.block_t,
        BLOCK_E=blocks.block_e,
    )
    select = _select if blocks.group_size <= LONGEST_BLOCK else expert_choice_long.select
    select(affinities, slots, weights, plan, scale, capacity)
    held = _place(affinities, slots, weights, plan, blocks, scale, capacity, per_token)
    losses = (load_balance, z_loss, terms)
    finish_expert_choice(sums, held, plan, losses, tokens, num_groups, capacity)
    return outputs


ops.expert_choice.implement("triton", _expert_choice, DEVICE_TYPES)
