"""Affinities of every token and expert, to the bit those that the routing kernels rank by."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton.launch import DEVICE_TYPES, launch
from moe_kernels.backends.triton.token_block import (
    SIZES,
    affinity_block,
    block_tokens,
    load_logits,
    token_blocks,
)
from moe_kernels.ops import route as ops


@triton.jit(do_not_specialize=SIZES)
def _affinity_fwd_kernel(
    logits_ptr,
    probs_ptr,
    group_size,
    blocks_per_group,
    AFFINITY: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    _, _, token, is_token = block_tokens(group_size, blocks_per_group, BLOCK_T)
    logits = load_logits(logits_ptr, token, is_token, NUM_EXPERTS, BLOCK_E)  # (BLOCK_T, BLOCK_E)
    affinity = affinity_block(logits, AFFINITY, NUM_EXPERTS, BLOCK_E)
    expert = tl.arange(0, BLOCK_E)[None, :]
    mask = is_token[:, None] & (expert < NUM_EXPERTS)
    tl.store(probs_ptr + token[:, None] * NUM_EXPERTS + expert, affinity, mask=mask)


def _affinity(router_logits: Tensor, affinity: str) -> Tensor:
    logits = router_logits.contiguous()
    probs = torch.empty_like(logits)
    tokens, experts = logits.shape
    blocks = token_blocks(tokens, experts, num_groups=1)
    launch(
        _affinity_fwd_kernel,
        (blocks.num_blocks,),
        logits,
        probs,
        blocks.group_size,
        blocks.blocks_per_group,
        AFFINITY=affinity,
        NUM_EXPERTS=experts,
        BLOCK_T=blocks.block_t,
        BLOCK_E=blocks.block_e,
    )
    return probs


ops.affinity.implement("triton", _affinity, DEVICE_TYPES)
