"""Similarity loss: 1/T · sum over tokens of p^T W p, W from how often two experts share a token.

Forward: counts of pairs of experts as a product of 0/1 tiles, partial sums of a fixed split of the
tokens; W from them; then p^T W p of each block. Backward: 2 W p through the softmax.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton.launch import DEVICE_TYPES, PARTS, block_size, launch
from moe_kernels.backends.triton.token_block import SIZES, load_logits, softmax_block
from moe_kernels.ops import route as ops

_TOKENS = 32  # tokens of a 0/1 tile
_TILE = 64  # its experts; the least of Hopper's tensor cores
_COLUMNS = 16  # experts of a step of p W, so that (16, 512) of W fits 64 KiB of shared memory


@triton.jit
def _chosen_tile(
    row_experts_ptr,
    row_offsets_ptr,
    token,
    is_token,
    first_expert,
    BLOCK_T: tl.constexpr,
    TILE: tl.constexpr,
):
    """(BLOCK_T, TILE) fp16, 1 where one of the experts from the first on takes the token."""
    expert = first_expert + tl.arange(0, TILE)
    start = tl.load(row_offsets_ptr + token, mask=is_token, other=0)  # (BLOCK_T,)
    end = tl.load(row_offsets_ptr + token + 1, mask=is_token, other=0)  # (BLOCK_T,)
    chosen = tl.zeros((BLOCK_T, TILE), tl.float16)
    for i in range(tl.max(end - start, axis=0)):
        slot = start + i
        own = tl.load(row_experts_ptr + slot, mask=slot < end, other=-1)  # (BLOCK_T,)
        chosen = tl.where(expert[None, :] == own[:, None], 1.0, chosen).to(tl.float16)
    return chosen


@triton.jit(do_not_specialize=[*SIZES, "tokens_per_split"], do_not_specialize_on_alignment=PARTS)
def _pairs_fwd_kernel(
    row_experts_ptr,
    row_offsets_ptr,
    pairs_ptr,
    num_tokens,
    tokens_per_split,
    NUM_EXPERTS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE: tl.constexpr,
):
    """How often pairs of experts share a token of the split: one tile of (splits, E, E)."""
    split = tl.program_id(0).to(tl.int64)
    first_row = tl.program_id(1) // TILES * TILE
    first_column = tl.program_id(1) % TILES * TILE
    start = split * tokens_per_split
    pairs = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, tokens_per_split, BLOCK_T):
        token = start + first + tl.arange(0, BLOCK_T)  # a split is a multiple of BLOCK_T long
        is_token = token < num_tokens
        rows = _chosen_tile(
            row_experts_ptr, row_offsets_ptr, token, is_token, first_row, BLOCK_T, TILE
        )
        columns = rows
        if TILES > 1:
            columns = _chosen_tile(
                row_experts_ptr, row_offsets_ptr, token, is_token, first_column, BLOCK_T, TILE
            )
        pairs = tl.dot(tl.trans(rows), columns, pairs)  # 0 and 1 in fp16, counts in fp32: exact
    row = first_row + tl.arange(0, TILE)
    column = first_column + tl.arange(0, TILE)
    place = (split * NUM_EXPERTS + row[:, None]) * NUM_EXPERTS + column[None, :]
    mask = (row[:, None] < NUM_EXPERTS) & (column[None, :] < NUM_EXPERTS)
    tl.store(pairs_ptr + place, pairs, mask=mask)  # (TILE, TILE)


@triton.jit
def _weighted_softmax(
    logits_ptr,
    pair_weights_ptr,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The block's tokens, their softmax p, and W p."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # (BLOCK_T,)
    is_token = token < num_tokens
    logits = load_logits(logits_ptr, token, is_token, NUM_EXPERTS, BLOCK_E)  # (BLOCK_T, BLOCK_E)
    softmax, logsumexp, _ = softmax_block(logits)
    expert = tl.arange(0, BLOCK_E)
    weighted = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(0, NUM_EXPERTS, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = is_token[:, None] & (column < NUM_EXPERTS)[None, :]
        place = token[:, None] * NUM_EXPERTS + column[None, :]
        part = tl.load(logits_ptr + place, mask=mask, other=float("-inf"))  # (BLOCK_T, COLUMNS)
        part = tl.exp(part - logsumexp[:, None])
        mask = (column < NUM_EXPERTS)[:, None] & (expert < NUM_EXPERTS)[None, :]
        place = column[:, None] * NUM_EXPERTS + expert[None, :]
        pairs = tl.load(pair_weights_ptr + place, mask=mask, other=0.0)  # (COLUMNS, BLOCK_E)
        weighted = tl.dot(part, pairs, weighted, input_precision="ieee")
    return token, is_token, softmax, weighted


@triton.jit(do_not_specialize=SIZES)
def _similarity_fwd_kernel(
    logits_ptr,
    pair_weights_ptr,
    sums_ptr,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum of p^T W p over the block's tokens."""
    _, is_token, softmax, weighted = _weighted_softmax(
        logits_ptr, pair_weights_ptr, num_tokens, NUM_EXPERTS, BLOCK_T, BLOCK_E, COLUMNS
    )
    total = tl.where(is_token, tl.sum(softmax * weighted, axis=1), 0.0)  # (BLOCK_T,)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARTS)
def _similarity_bwd_kernel(
    logits_ptr,
    pair_weights_ptr,
    dloss_ptr,
    dlogits_ptr,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token, is_token, softmax, weighted = _weighted_softmax(
        logits_ptr, pair_weights_ptr, num_tokens, NUM_EXPERTS, BLOCK_T, BLOCK_E, COLUMNS
    )
    # W is symmetric: d(p^T W p) = 2 W p.
    upstream = 2.0 * tl.load(dloss_ptr) / tl.maximum(num_tokens, 1).to(tl.float32)
    mean = tl.sum(softmax * weighted, axis=1)[:, None]
    dlogits = upstream * softmax * (weighted - mean)
    expert = tl.arange(0, BLOCK_E)[None, :]
    mask = is_token[:, None] & (expert < NUM_EXPERTS)
    place = token[:, None] * NUM_EXPERTS + expert
    tl.store(dlogits_ptr + place, dlogits, mask=mask)  # (BLOCK_T, BLOCK_E)


def _count_pairs(row_experts: Tensor, row_offsets: Tensor, num_experts: int) -> Tensor:
    """(E, E) fp32, tokens that both experts take."""
    tokens = row_offsets.shape[0] - 1
    tiles = triton.cdiv(num_experts, _TILE)
    # About 256 programs at most; sums are exact, so that their number changes no bit.
    splits = max(min(triton.cdiv(tokens, 16 * _TOKENS), 256 // tiles**2), 1)
    per_split = triton.cdiv(triton.cdiv(tokens, splits), _TOKENS) * _TOKENS
    pairs = row_experts.new_empty(splits, num_experts, num_experts, dtype=torch.float32)
    launch(
        _pairs_fwd_kernel,
        (splits, tiles * tiles),
        row_experts,
        row_offsets,
        pairs,
        tokens,
        per_split,
        NUM_EXPERTS=num_experts,
        TILES=tiles,
        BLOCK_T=_TOKENS,
        TILE=_TILE,
    )
    return pairs.sum(0)


def _weigh_pairs(together: Tensor) -> Tensor:
    """W: co-selection counts, the diagonal scaled to the sum E, the rest to E² - E."""
    experts = together.shape[0]
    own = torch.diagonal(together)
    pairs = together - torch.diag(own)
    weights = torch.diag(own) * (experts / own.sum().clamp_min(1))
    return weights + pairs * ((experts * experts - experts) / pairs.sum().clamp_min(1))


def _blocks(num_experts: int) -> dict[str, int]:
    """Tiles of p W; 8192 numbers a program at 512 experts."""
    block_e = block_size(num_experts)
    warps = 8 if block_e > 256 else 4
    block_t = min(max(2048 // block_e, 16), 64)
    return {"BLOCK_T": block_t, "BLOCK_E": block_e, "COLUMNS": _COLUMNS, "num_warps": warps}


def _similarity(
    router_logits: Tensor, row_experts: Tensor, row_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    logits = router_logits.contiguous()
    tokens, experts = logits.shape
    weights = _weigh_pairs(
        _count_pairs(row_experts.contiguous(), row_offsets.contiguous(), experts)
    )
    blocks = _blocks(experts)
    num_blocks = triton.cdiv(tokens, blocks["BLOCK_T"])
    sums = logits.new_empty(num_blocks)
    launch(
        _similarity_fwd_kernel,
        (num_blocks,),
        logits,
        weights,
        sums,
        tokens,
        NUM_EXPERTS=experts,
        **blocks,
    )
    return sums.sum() / max(tokens, 1), weights


def _similarity_bwd(router_logits: Tensor, pair_weights: Tensor, dloss: Tensor) -> Tensor:
    logits = router_logits.contiguous()
    tokens, experts = logits.shape
    dlogits = torch.empty_like(logits)
    blocks = _blocks(experts)
    launch(
        _similarity_bwd_kernel,
        (triton.cdiv(tokens, blocks["BLOCK_T"]),),
        logits,
        pair_weights.contiguous(),
        dloss,
        dlogits,
        tokens,
        NUM_EXPERTS=experts,
        **blocks,
    )
    return dlogits


ops.similarity.implement("triton", _similarity, DEVICE_TYPES)
ops.similarity_bwd.implement("triton", _similarity_bwd, DEVICE_TYPES)
