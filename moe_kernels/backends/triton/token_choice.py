"""Token choice: top-k of each token, then a stable counting sort of the choices by expert.

Four launches: top-k with the counts and loss sums of each block of tokens; prefixes of the counts
inside each group; prefixes over groups, and the losses; rows and each token's list of rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton.launch import DEVICE_TYPES, PARTS, block_size, launch
from moe_kernels.backends.triton.route_losses import finish_token_choice, scan_groups
from moe_kernels.backends.triton.token_block import (
    SIZES,
    block_tokens,
    cut,
    load_logits,
    ordered_bits,
    positive_or_one,
    ranking_key,
    routing_block,
    store_loss_sums,
    token_blocks,
    value_of_bits,
)
from moe_kernels.checks import check_finite_logits
from moe_kernels.ops import route as ops

_TAKEN = tl.constexpr(-(1 << 63))  # below every packed key
_LOWEST = tl.constexpr(-2139095041)  # ordered_bits(-inf)


@triton.jit
def _pack(ordered, index, LAST: tl.constexpr):
    """int64 that ranks by key, then by falling index: equal keys go to the lower index."""
    return (ordered.to(tl.int64) << 32) | (LAST - index)


@triton.jit
def _index(packed, LAST: tl.constexpr):
    return LAST - (packed & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _value(packed):
    return value_of_bits((packed >> 32).to(tl.int32))


@triton.jit
def _keep_best_groups(
    ranked,
    NUM_EXPERTS: tl.constexpr,
    EXPERT_GROUPS: tl.constexpr,
    TOP_K_GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Give experts outside each token's best groups the key -inf.

    A group's worth is the sum of its two best keys (its one key when it holds one expert).
    """
    SIZE: tl.constexpr = NUM_EXPERTS // EXPERT_GROUPS
    expert = tl.arange(0, BLOCK_E)[None, :]
    group = tl.arange(0, BLOCK_G)[None, :]
    worth = tl.full((BLOCK_T, BLOCK_G), _TAKEN, tl.int64)
    for g in range(EXPERT_GROUPS):
        inside = tl.where(expert // SIZE == g, ranked, _TAKEN)  # (BLOCK_T, BLOCK_E)
        first = tl.max(inside, axis=1)  # (BLOCK_T,)
        key = _value(first)
        if SIZE > 1:
            second = tl.max(tl.where(inside == first[:, None], _TAKEN, inside), axis=1)
            key += _value(second)
        own = _pack(ordered_bits(ranking_key(key)), g, BLOCK_G - 1)
        worth = tl.where(group == g, own[:, None], worth)  # (BLOCK_T, BLOCK_G)
    kept = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for _ in range(TOP_K_GROUPS):
        best = tl.max(worth, axis=1)[:, None]
        kept = tl.where(expert // SIZE == _index(best, BLOCK_G - 1), 1, kept)
        worth = tl.where(worth == best, _TAKEN, worth)
    outside = (kept == 0) & (expert < NUM_EXPERTS)
    lowest = _pack(tl.full((1, BLOCK_E), _LOWEST, tl.int32), expert, BLOCK_E - 1)
    return tl.where(outside, lowest, ranked)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARTS)
def _token_choice_fwd_kernel(
    logits_ptr,
    bias_ptr,
    expert_indices_ptr,
    weights_ptr,
    counts_ptr,
    sums_ptr,
    group_size,
    blocks_per_group,
    AFFINITY: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERT_GROUPS: tl.constexpr,
    TOP_K_GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Experts and affinities (T, K) of the block's tokens, its counts and its loss sums."""
    _, _, token, is_token = block_tokens(group_size, blocks_per_group, BLOCK_T)
    logits = load_logits(logits_ptr, token, is_token, NUM_EXPERTS, BLOCK_E)  # (BLOCK_T, BLOCK_E)
    affinity, _, distribution, entropy, logsumexp = routing_block(
        logits, AFFINITY, NUM_EXPERTS, BLOCK_E
    )
    store_loss_sums(sums_ptr, is_token, distribution, entropy, logsumexp, NUM_EXPERTS, BLOCK_E)

    expert = tl.arange(0, BLOCK_E)[None, :]
    key = ranking_key(affinity)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert, mask=expert < NUM_EXPERTS, other=0.0)  # (1, BLOCK_E)
        key = ranking_key(key + bias)
    ranked = _pack(ordered_bits(key), expert, BLOCK_E - 1)
    ranked = tl.where(expert < NUM_EXPERTS, ranked, _TAKEN)
    if TOP_K_GROUPS < EXPERT_GROUPS:
        ranked = _keep_best_groups(
            ranked, NUM_EXPERTS, EXPERT_GROUPS, TOP_K_GROUPS, BLOCK_T, BLOCK_E, BLOCK_G
        )
    for k in range(TOP_K):
        best = tl.max(ranked, axis=1)  # (BLOCK_T,)
        won = ranked == best[:, None]  # no two packed keys of a token are equal
        weight = tl.sum(tl.where(won, affinity, 0.0), axis=1)
        tl.store(expert_indices_ptr + token * TOP_K + k, _index(best, BLOCK_E - 1), mask=is_token)
        tl.store(weights_ptr + token * TOP_K + k, weight, mask=is_token)  # (BLOCK_T,)
        ranked = tl.where(won, _TAKEN, ranked)
    chosen = ((ranked == _TAKEN) & is_token[:, None]).to(tl.int32)
    place = tl.program_id(0).to(tl.int64) * NUM_EXPERTS + tl.arange(0, BLOCK_E)
    mask = tl.arange(0, BLOCK_E) < NUM_EXPERTS
    tl.store(counts_ptr + place, tl.sum(chosen, axis=0), mask=mask)  # (BLOCK_E,)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARTS)
def _token_choice_place_kernel(
    weights_ptr,
    expert_indices_ptr,
    block_starts_ptr,
    group_starts_ptr,
    expert_offsets_ptr,
    routing_weights_ptr,
    token_indices_ptr,
    row_indices_ptr,
    row_experts_ptr,
    row_offsets_ptr,
    scale,
    group_size,
    blocks_per_group,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Rows of the block's choices: after the earlier groups, blocks and tokens of the expert."""
    group, _, token, is_token = block_tokens(group_size, blocks_per_group, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    held = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    weight = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for k in range(TOP_K):
        chosen = tl.load(expert_indices_ptr + token * TOP_K + k, mask=is_token, other=-1)
        own = tl.load(weights_ptr + token * TOP_K + k, mask=is_token, other=0.0)  # (BLOCK_T,)
        is_chosen = expert[None, :] == chosen[:, None]  # (BLOCK_T, BLOCK_E)
        held = tl.where(is_chosen, 1, held)
        weight = tl.where(is_chosen, own[:, None], weight)
    if PER_TOKEN:
        weight = weight / positive_or_one(tl.sum(weight, axis=1))[:, None]

    is_expert = expert < NUM_EXPERTS
    block = tl.program_id(0).to(tl.int64)
    start = tl.load(expert_offsets_ptr + expert, mask=is_expert, other=0).to(tl.int64)  # (BLOCK_E,)
    place = group.to(tl.int64) * NUM_EXPERTS + expert
    start += tl.load(group_starts_ptr + place, mask=is_expert, other=0)  # (BLOCK_E,)
    place = block * NUM_EXPERTS + expert
    start += tl.load(block_starts_ptr + place, mask=is_expert, other=0)  # (BLOCK_E,)

    mask = held > 0
    row = start[None, :] + tl.cumsum(held, axis=0) - held  # (BLOCK_T, BLOCK_E)
    slot = token[:, None] * TOP_K + tl.cumsum(held, axis=1) - held  # (BLOCK_T, BLOCK_E)
    none = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    tl.store(token_indices_ptr + row, token.to(tl.int32)[:, None] + none, mask=mask)
    tl.store(routing_weights_ptr + row, weight * scale, mask=mask)  # (BLOCK_T, BLOCK_E)
    tl.store(row_indices_ptr + slot, row.to(tl.int32), mask=mask)  # (BLOCK_T, BLOCK_E)
    tl.store(row_experts_ptr + slot, expert[None, :] + none, mask=mask)  # (BLOCK_T, BLOCK_E)
    tl.store(row_offsets_ptr + token, (token * TOP_K).to(tl.int32), mask=is_token)  # (BLOCK_T,)


def _token_choice(
    router_logits: Tensor,
    selection_bias: Tensor | None,
    top_k: int,
    affinity: str,
    per_token: bool,
    scale: float,
    num_expert_groups: int,
    top_k_groups: int,
    num_groups: int,
    check_finite: bool,
) -> ops.RouteOutputs:
    logits = router_logits.contiguous()
    if check_finite:
        check_finite_logits(logits)
    tokens, experts = logits.shape
    outputs = ops.empty_outputs(logits, num_groups, tokens * top_k, top_k)
    weights, load_balance, z_loss, terms, packed = outputs
    plan = cut(packed, logits, num_groups, tokens * top_k, top_k)
    blocks = token_blocks(tokens, experts, num_groups)
    grid = (blocks.num_blocks,)
    weights_by_token = logits.new_empty(tokens, top_k)
    counts = packed.new_empty(blocks.num_blocks, experts)
    sums = logits.new_empty(blocks.num_blocks, experts + 2)
    if selection_bias is not None:
        selection_bias = selection_bias.to(logits.dtype).contiguous()
    launch(
        _token_choice_fwd_kernel,
        grid,
        logits,
        selection_bias,
        plan.expert_indices,
        weights_by_token,
        counts,
        sums,
        blocks.group_size,
        blocks.blocks_per_group,
        AFFINITY=affinity,
        NUM_EXPERTS=experts,
        TOP_K=top_k,
        EXPERT_GROUPS=num_expert_groups,
        TOP_K_GROUPS=top_k_groups,
        HAS_BIAS=selection_bias is not None,
        BLOCK_T=blocks.block_t,
        BLOCK_E=blocks.block_e,
        BLOCK_G=block_size(num_expert_groups, smallest=4),
    )
    group_sums = scan_groups(counts, sums, plan, blocks, num_groups)
    losses = (load_balance, z_loss, terms)
    group_starts = finish_token_choice(group_sums, plan, losses, tokens, num_groups, experts, top_k)
    launch(
        _token_choice_place_kernel,
        grid,
        weights_by_token,
        plan.expert_indices,
        counts,
        group_starts,
        plan.expert_offsets,
        weights,
        plan.token_indices,
        plan.row_indices,
        plan.row_experts,
        plan.row_offsets,
        scale,
        blocks.group_size,
        blocks.blocks_per_group,
        NUM_EXPERTS=experts,
        TOP_K=top_k,
        PER_TOKEN=per_token,
        BLOCK_T=blocks.block_t,
        BLOCK_E=blocks.block_e,
        num_warps=8,
    )
    return outputs


ops.token_choice.implement("triton", _token_choice, DEVICE_TYPES)
