"""One block of tokens: what every routing kernel does first, and its place among the blocks.

A block lies inside one group. Every number of a token comes out the same whichever kernel computes
it, with whatever block size: what is rounded does not depend on the order of an addition.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton.launch import block_size
from moe_kernels.ops.pack import PlanIndices, packed_sizes, unpack

# Arguments that change from batch to batch: no variant of a kernel for the value 1 or for
# multiples of 16.
SIZES = ["num_tokens", "num_groups", "group_size", "blocks_per_group", "num_blocks", "num_rows"]
SIZES += ["capacity", "num_chunks"]

# 1 in the fixed-point sum of exponentials: 512 of them take 50 of 63 bits.
_ONE = tl.constexpr(float(1 << 40))


class TokenBlocks(NamedTuple):
    """How the tokens are cut; block b is block b % blocks_per_group of group b // that."""

    group_size: int
    blocks_per_group: int
    num_blocks: int
    block_t: int
    block_e: int


def token_blocks(num_tokens: int, num_experts: int, num_groups: int) -> TokenBlocks:
    """Blocks of 2048 logits at most: 16 a thread in 4 warps, which top-k holds as int64."""
    block_e = block_size(num_experts, smallest=4)
    block_t = max(1, min(2048 // block_e, 128))
    group_size = num_tokens // num_groups
    per_group = triton.cdiv(group_size, block_t)
    return TokenBlocks(group_size, per_group, per_group * num_groups, block_t, block_e)


def cut(packed: Tensor, router_logits: Tensor, groups: int, rows: int, top_k: int) -> PlanIndices:
    """Views of the parts of a plan's buffer."""
    tokens, experts = router_logits.shape
    return unpack(packed, packed_sizes(tokens, experts, groups, rows, top_k))


@triton.jit
def block_tokens(group_size, blocks_per_group, BLOCK_T: tl.constexpr):
    """The block's group, and each token's place in it, its number, and whether there is one."""
    block = tl.program_id(0)
    group = block // blocks_per_group
    place = (block % blocks_per_group) * BLOCK_T + tl.arange(0, BLOCK_T)  # (BLOCK_T,)
    token = group.to(tl.int64) * group_size + place  # (BLOCK_T,)
    return group, place, token, place < group_size


@triton.jit
def load_logits(logits_ptr, token, is_token, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Logits of the tokens; -inf in columns past the last expert, so that softmax is 0 there."""
    expert = tl.arange(0, BLOCK_E)[None, :]
    place = token[:, None] * NUM_EXPERTS + expert
    mask = is_token[:, None] & (expert < NUM_EXPERTS)
    logits = tl.load(logits_ptr + place, mask=mask, other=0.0)  # (BLOCK_T, BLOCK_E)
    return tl.where(expert < NUM_EXPERTS, logits, float("-inf"))


@triton.jit
def softmax_block(logits):
    """Softmax, logsumexp and entropy of each row; a row with NaN or +inf is NaN throughout."""
    top = tl.max(logits, axis=1)  # (BLOCK_T,)
    shifted = logits - top[:, None]
    value = tl.exp(shifted)
    # In fixed point, because a sum in floating point depends on the layout that the compiler
    # picks, and equal rows would be ranked by where they lie. NaN does not fit and is added after.
    fixed = tl.where(value >= 0, value * _ONE, 0.0).to(tl.int64)
    total = tl.sum(fixed, axis=1).to(tl.float32) * (1.0 / _ONE)
    total += tl.sum(value * 0.0, axis=1)  # (BLOCK_T,)
    inverse = 1.0 / total
    weighted = tl.sum(value * tl.where(value > 0, shifted, 0.0), axis=1)  # 0 * -inf is 0 here
    log_total = tl.log(total)
    return value * inverse[:, None], top + log_total, log_total - weighted * inverse


@triton.jit
def affinity_block(
    logits, AFFINITY: tl.constexpr, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Affinities; 0 in columns past the last expert."""
    if AFFINITY == "softmax":
        affinity, _, _ = softmax_block(logits)
    elif AFFINITY == "sigmoid":
        affinity = 1.0 / (1.0 + tl.exp(-logits))
    else:
        affinity = tl.where(tl.arange(0, BLOCK_E)[None, :] < NUM_EXPERTS, logits, 0.0)
    return affinity  # (BLOCK_T, BLOCK_E)


@triton.jit
def routing_block(logits, AFFINITY: tl.constexpr, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Affinities, softmax, the distribution over experts, its entropy, and logsumexp."""
    softmax, logsumexp, entropy = softmax_block(logits)
    affinity = softmax
    if AFFINITY != "softmax":
        affinity = affinity_block(logits, AFFINITY, NUM_EXPERTS, BLOCK_E)
    distribution = softmax
    if AFFINITY == "sigmoid":
        distribution = affinity / positive_or_one(tl.sum(affinity, axis=1))[:, None]
        # Below 1e-30 the logarithm of a number that may be 0; the term is 0 to any precision.
        log = tl.log(tl.maximum(distribution, 1e-30))
        entropy = -tl.sum(tl.where(distribution > 1e-30, distribution * log, 0.0), axis=1)
    return affinity, softmax, distribution, entropy, logsumexp


@triton.jit
def positive_or_one(total):
    """The divisor of a normalisation: 0 / 0 = 0 when every affinity of a token underflowed."""
    return tl.where(total > 0, total, 1.0)


@triton.jit
def ranking_key(affinity):
    """What selection compares: NaN ranks with -inf."""
    return tl.where(affinity == affinity, affinity, float("-inf"))


@triton.jit
def ordered_bits(key):
    """int32 in the order of the fp32 keys, none of which is NaN; -0 and 0 are equal."""
    bits = tl.where(key == 0, 0.0, key).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of_bits(ordered):
    """The fp32 key of an ``ordered_bits``."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def choose(greater, equal, greater_before, equal_before, needed):
    """What an expert takes of a chunk of tokens: those above its threshold, the first equal ones.

    Returns whether each is taken, how many tokens before it are, and the counts behind the chunk.
    """
    # Two counts in one scan: a chunk has fewer than 2^15 tokens.
    both = greater.to(tl.int32) + (equal.to(tl.int32) << 16)
    before = tl.cumsum(both, axis=0) - both
    total = tl.sum(both, axis=0)
    equals = equal_before + (before >> 16)
    chosen = greater | (equal & (equals < needed))
    position = greater_before + (before & 0xFFFF) + tl.minimum(equals, needed)
    return chosen, position, greater_before + (total & 0xFFFF), equal_before + (total >> 16)


@triton.jit
def store_loss_sums(
    sums_ptr,
    is_token,
    distribution,
    entropy,
    logsumexp,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The block's row of sums (num_blocks, E + 2): distribution, squared logsumexp, entropy."""
    sums_ptr += tl.program_id(0).to(tl.int64) * (NUM_EXPERTS + 2)
    expert = tl.arange(0, BLOCK_E)  # (BLOCK_E,)
    total = tl.sum(tl.where(is_token[:, None], distribution, 0.0), axis=0)
    tl.store(sums_ptr + expert, total, mask=expert < NUM_EXPERTS)  # (BLOCK_E,)
    tl.store(sums_ptr + NUM_EXPERTS, tl.sum(tl.where(is_token, logsumexp * logsumexp, 0.0)))
    tl.store(sums_ptr + NUM_EXPERTS + 1, tl.sum(tl.where(is_token, entropy, 0.0)))
