"""Backward of both routers: d(routing weights) and d(losses) to d(logits), in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton.launch import DEVICE_TYPES, PARTS, launch
from moe_kernels.backends.triton.token_block import (
    SIZES,
    block_tokens,
    cut,
    load_logits,
    positive_or_one,
    routing_block,
    token_blocks,
)
from moe_kernels.ops import route as ops
from moe_kernels.ops.pack import packed_sizes

_BALANCE_PER_GROUP = tl.constexpr(ops.BALANCE_PER_GROUP)
_MEAN_PROB = tl.constexpr(ops.MEAN_PROB)


@triton.jit
def _affinity_gradient(
    dweights_ptr,
    row_indices_ptr,
    row_experts_ptr,
    row_offsets_ptr,
    affinity,
    token,
    is_token,
    scale,
    PER_TOKEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """d(affinity): each row's d(weight) at its token and expert, with the normalisation undone."""
    expert = tl.arange(0, BLOCK_E)[None, :]
    start = tl.load(row_offsets_ptr + token, mask=is_token, other=0)  # (BLOCK_T,)
    end = tl.load(row_offsets_ptr + token + 1, mask=is_token, other=0)  # (BLOCK_T,)
    gradient = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    held = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for i in range(tl.max(end - start, axis=0)):
        slot = start + i
        used = slot < end
        row = tl.load(row_indices_ptr + slot, mask=used, other=0)  # (BLOCK_T,)
        own = tl.load(row_experts_ptr + slot, mask=used, other=-1)  # (BLOCK_T,)
        dweight = tl.load(dweights_ptr + row, mask=used, other=0.0)  # (BLOCK_T,)
        is_own = expert == own[:, None]
        gradient = tl.where(is_own, dweight[:, None], gradient)  # (BLOCK_T, BLOCK_E)
        if PER_TOKEN:
            held = tl.where(is_own, 1, held)
    if PER_TOKEN:
        value = tl.where(held > 0, affinity, 0.0)
        total = tl.sum(value, axis=1)
        divisor = positive_or_one(total)[:, None]
        product = tl.sum(value * gradient, axis=1)[:, None]
        correction = tl.where(total[:, None] > 0, product / divisor, 0.0)
        gradient = tl.where(held > 0, (gradient - correction) / divisor, 0.0)
    return gradient * scale


@triton.jit
def _loss_coefficients(
    dload_balance_ptr,
    dterms_ptr,
    tokens_per_expert_ptr,
    group_counts_ptr,
    group,
    num_tokens,
    num_groups,
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    HAS_BALANCE: tl.constexpr,
    HAS_TERMS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """d(losses) / d(distribution), the same for every token of a group."""
    expert = tl.arange(0, BLOCK_E)
    is_expert = expert < NUM_EXPERTS
    tokens = tl.maximum(num_tokens, 1).to(tl.float32)
    frequency = NUM_EXPERTS / tl.maximum(num_rows, 1).to(tl.float32)
    coefficients = tl.zeros((BLOCK_E,), tl.float32)
    if HAS_BALANCE:
        rows = tl.load(tokens_per_expert_ptr + expert, mask=is_expert, other=0)  # (BLOCK_E,)
        coefficients += tl.load(dload_balance_ptr) * frequency * rows.to(tl.float32)
    if HAS_TERMS:
        place = group.to(tl.int64) * NUM_EXPERTS + expert
        rows = tl.load(group_counts_ptr + place, mask=is_expert, other=0)  # (BLOCK_E,)
        per_group = tl.load(dterms_ptr + _BALANCE_PER_GROUP) * num_groups
        coefficients += per_group * frequency * rows.to(tl.float32)
        coefficients += tl.load(dterms_ptr + _MEAN_PROB + expert, mask=is_expert, other=0.0)
    return coefficients / tokens


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARTS)
def _route_bwd_kernel(
    logits_ptr,
    dweights_ptr,
    dload_balance_ptr,
    dz_loss_ptr,
    dterms_ptr,
    row_indices_ptr,
    row_experts_ptr,
    row_offsets_ptr,
    tokens_per_expert_ptr,
    group_counts_ptr,
    dlogits_ptr,
    scale,
    num_tokens,
    num_groups,
    num_rows,
    group_size,
    blocks_per_group,
    AFFINITY: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BALANCE: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_TERMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    group, _, token, is_token = block_tokens(group_size, blocks_per_group, BLOCK_T)
    logits = load_logits(logits_ptr, token, is_token, NUM_EXPERTS, BLOCK_E)  # (BLOCK_T, BLOCK_E)
    affinity, softmax, distribution, _, logsumexp = routing_block(
        logits, AFFINITY, NUM_EXPERTS, BLOCK_E
    )
    gradient = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if HAS_WEIGHTS:
        gradient = _affinity_gradient(
            dweights_ptr,
            row_indices_ptr,
            row_experts_ptr,
            row_offsets_ptr,
            affinity,
            token,
            is_token,
            scale,
            PER_TOKEN,
            BLOCK_T,
            BLOCK_E,
        )
    dsoftmax = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if HAS_BALANCE or HAS_TERMS:
        coefficients = _loss_coefficients(
            dload_balance_ptr,
            dterms_ptr,
            tokens_per_expert_ptr,
            group_counts_ptr,
            group,
            num_tokens,
            num_groups,
            num_rows,
            NUM_EXPERTS,
            HAS_BALANCE,
            HAS_TERMS,
            BLOCK_E,
        )[None, :]
        if AFFINITY == "sigmoid":  # the distribution is sigmoid over its sum
            mean = tl.sum(distribution * coefficients, axis=1)[:, None]
            divisor = positive_or_one(tl.sum(affinity, axis=1))[:, None]
            gradient += (coefficients - mean) / divisor
        else:
            dsoftmax += coefficients

    if AFFINITY == "softmax":
        dsoftmax += gradient
    mean = tl.sum(softmax * dsoftmax, axis=1)
    if HAS_Z:
        tokens = tl.maximum(num_tokens, 1).to(tl.float32)
        mean -= 2.0 * tl.load(dz_loss_ptr) / tokens * logsumexp
    dlogits = softmax * (dsoftmax - mean[:, None])
    if AFFINITY == "sigmoid":
        dlogits += gradient * affinity * (1.0 - affinity)
    if AFFINITY == "identity":
        dlogits += gradient
    expert = tl.arange(0, BLOCK_E)[None, :]
    mask = is_token[:, None] & (expert < NUM_EXPERTS)
    place = token[:, None] * NUM_EXPERTS + expert
    tl.store(dlogits_ptr + place, dlogits, mask=mask)  # (BLOCK_T, BLOCK_E)


def _route_bwd(
    router_logits: Tensor,
    packed: Tensor,
    dweights: Tensor | None,
    dload_balance: Tensor | None,
    dz_loss: Tensor | None,
    dterms: Tensor | None,
    num_rows: int,
    num_groups: int,
    affinity: str,
    per_token: bool,
    scale: float,
) -> Tensor:
    logits = router_logits.contiguous()
    tokens, experts = logits.shape
    dlogits = torch.empty_like(logits)
    # expert_indices, the last part, is not read: its length is what the others leave.
    shorter = sum(packed_sizes(tokens, experts, num_groups, num_rows, 0))
    plan = cut(packed[:shorter], logits, num_groups, num_rows, 0)
    blocks = token_blocks(tokens, experts, num_groups)
    launch(
        _route_bwd_kernel,
        (blocks.num_blocks,),
        logits,
        None if dweights is None else dweights.contiguous(),
        dload_balance,
        dz_loss,
        None if dterms is None else dterms.contiguous(),
        plan.row_indices,
        plan.row_experts,
        plan.row_offsets,
        plan.tokens_per_expert,
        plan.group_counts,
        dlogits,
        scale,
        tokens,
        num_groups,
        num_rows,
        blocks.group_size,
        blocks.blocks_per_group,
        AFFINITY=affinity,
        NUM_EXPERTS=experts,
        PER_TOKEN=per_token,
        HAS_WEIGHTS=dweights is not None,
        HAS_BALANCE=dload_balance is not None,
        HAS_Z=dz_loss is not None,
        HAS_TERMS=dterms is not None,
        BLOCK_T=blocks.block_t,
        BLOCK_E=blocks.block_e,
    )
    return dlogits


ops.route_bwd.implement("triton", _route_bwd, DEVICE_TYPES)
