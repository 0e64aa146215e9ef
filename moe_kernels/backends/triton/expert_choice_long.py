"""Selection of expert choice from pools too long for one program: a radix select over chunks.

Four passes, from the highest 8 bits of the keys to the lowest: each counts, in every chunk of a
pool, the keys by their next 8 bits, and picks the bits of the C-th largest. Then the keys above it
and equal to it are counted, and each chunk places what is chosen after the chunks before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton.launch import PARTS, launch
from moe_kernels.backends.triton.token_block import (
    SIZES,
    choose,
    ordered_bits,
    ranking_key,
)
from moe_kernels.ops.pack import PlanIndices

CHUNK = 4096  # keys of a program, 16 a thread in 8 warps
_BINS = tl.constexpr(256)
# Chunks whose counts a program reads at a time.
_ROWS = 16
_COUNTS = 256


@triton.jit
def _load_keys(affinity_ptr, pool, chunk, group_size, CHUNK: tl.constexpr):
    """A chunk's tokens in the group, affinities, and keys as int64 in 0 ... 2^32."""
    token = chunk * CHUNK + tl.arange(0, CHUNK)  # (CHUNK,)
    is_token = token < group_size
    place = pool.to(tl.int64) * group_size + token
    affinity = tl.load(affinity_ptr + place, mask=is_token, other=0.0)  # (CHUNK,)
    key = ordered_bits(ranking_key(affinity)).to(tl.int64) + (1 << 31)
    return token, is_token, place, affinity, key


@triton.jit(do_not_specialize=SIZES)
def _radix_count_kernel(
    affinity_ptr,
    threshold_ptr,
    histograms_ptr,
    group_size,
    num_chunks,
    SHIFT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Keys of the chunk that agree with the threshold above SHIFT + 8 bits, by their next 8."""
    pool = tl.program_id(0)
    chunk = tl.program_id(1)
    _, is_token, _, _, key = _load_keys(affinity_ptr, pool, chunk, group_size, CHUNK)
    agrees = is_token
    if SHIFT < 24:
        threshold = tl.load(threshold_ptr + pool)
        agrees = agrees & ((key >> (SHIFT + 8)) == (threshold >> (SHIFT + 8)))
    digit = ((key >> SHIFT) & 255).to(tl.int32)
    counts = tl.histogram(digit, _BINS, mask=agrees)  # (_BINS,)
    place = (pool.to(tl.int64) * num_chunks + chunk) * _BINS + tl.arange(0, _BINS)
    tl.store(histograms_ptr + place, counts)


@triton.jit(do_not_specialize=SIZES)
def _radix_pick_kernel(
    histograms_ptr,
    threshold_ptr,
    needed_ptr,
    num_chunks,
    capacity,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The next 8 bits of a pool's threshold, and how many keys are still needed below them."""
    pool = tl.program_id(0)
    bin = tl.arange(0, _BINS)
    threshold = tl.full((), 0, tl.int64)
    needed = tl.full((), 0, tl.int32) + capacity
    if SHIFT < 24:
        threshold = tl.load(threshold_ptr + pool)
        needed = tl.load(needed_ptr + pool)
    counts = tl.zeros((_BINS,), tl.int32)
    for first in range(0, num_chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)
        place = (pool.to(tl.int64) * num_chunks + chunk)[:, None] * _BINS + bin[None, :]
        mask = (chunk < num_chunks)[:, None]
        counts += tl.sum(tl.load(histograms_ptr + place, mask=mask, other=0), axis=0)
    above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)  # (_BINS,) keys in higher bins
    digit = tl.max(tl.where(above + counts >= needed, bin, 0), axis=0)
    needed -= tl.sum(tl.where(bin == digit, above, 0), axis=0)
    tl.store(threshold_ptr + pool, threshold + (digit.to(tl.int64) << SHIFT))
    tl.store(needed_ptr + pool, needed)


@triton.jit(do_not_specialize=SIZES)
def _radix_compare_kernel(
    affinity_ptr,
    threshold_ptr,
    greater_ptr,
    equal_ptr,
    group_size,
    num_chunks,
    CHUNK: tl.constexpr,
):
    """Keys of the chunk above the threshold, and equal to it."""
    pool = tl.program_id(0)
    chunk = tl.program_id(1)
    _, is_token, _, _, key = _load_keys(affinity_ptr, pool, chunk, group_size, CHUNK)
    threshold = tl.load(threshold_ptr + pool)
    place = pool.to(tl.int64) * num_chunks + chunk
    tl.store(greater_ptr + place, tl.sum((is_token & (key > threshold)).to(tl.int32), axis=0))
    tl.store(equal_ptr + place, tl.sum((is_token & (key == threshold)).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARTS)
def _radix_place_kernel(
    affinity_ptr,
    threshold_ptr,
    needed_ptr,
    greater_ptr,
    equal_ptr,
    slots_ptr,
    routing_weights_ptr,
    token_indices_ptr,
    scale,
    num_groups,
    group_size,
    num_chunks,
    capacity,
    NUM_EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Rows of the chunk's chosen tokens; slots as in the selection by one program."""
    pool = tl.program_id(0)
    chunk = tl.program_id(1)
    group = pool // NUM_EXPERTS
    expert = pool % NUM_EXPERTS
    token, is_token, place, affinity, key = _load_keys(affinity_ptr, pool, chunk, group_size, CHUNK)
    threshold = tl.load(threshold_ptr + pool)
    needed = tl.load(needed_ptr + pool)
    greater_before = tl.full((), 0, tl.int32)
    equal_before = tl.full((), 0, tl.int32)
    for first in range(0, chunk, COUNTS):
        earlier = first + tl.arange(0, COUNTS)
        counts = pool.to(tl.int64) * num_chunks + earlier
        mask = earlier < chunk
        greater_before += tl.sum(tl.load(greater_ptr + counts, mask=mask, other=0), axis=0)
        equal_before += tl.sum(tl.load(equal_ptr + counts, mask=mask, other=0), axis=0)

    chosen, position, _, _ = choose(
        is_token & (key > threshold),
        is_token & (key == threshold),
        greater_before,
        equal_before,
        needed,
    )
    tl.store(slots_ptr + place, position * 2 + chosen.to(tl.int32), mask=is_token)
    row = (expert * num_groups + group).to(tl.int64) * capacity + position
    tl.store(token_indices_ptr + row, group * group_size + token, mask=chosen)  # (CHUNK,)
    tl.store(routing_weights_ptr + row, affinity * scale, mask=chosen)  # (CHUNK,)


def select(
    affinities: Tensor,
    slots: Tensor,
    weights: Tensor,
    plan: PlanIndices,
    scale: float,
    capacity: int,
) -> None:
    """Choose rows and fill slots (G, E, S) from affinities (G, E, S)."""
    groups, experts, size = affinities.shape
    pools, chunks = groups * experts, triton.cdiv(size, CHUNK)
    grid = (pools, chunks)
    histograms = slots.new_empty(pools, chunks, _BINS.value)
    threshold = slots.new_empty(pools, dtype=torch.int64)
    needed, greater, equal = slots.new_empty(pools), slots.new_empty(grid), slots.new_empty(grid)
    for shift in (24, 16, 8, 0):
        launch(
            _radix_count_kernel,
            grid,
            affinities,
            threshold,
            histograms,
            size,
            chunks,
            SHIFT=shift,
            CHUNK=CHUNK,
            num_warps=8,
        )
        launch(
            _radix_pick_kernel,
            (pools,),
            histograms,
            threshold,
            needed,
            chunks,
            capacity,
            SHIFT=shift,
            ROWS=_ROWS,
        )
    counts = (greater, equal)
    launch(
        _radix_compare_kernel,
        grid,
        affinities,
        threshold,
        *counts,
        size,
        chunks,
        CHUNK=CHUNK,
        num_warps=8,
    )
    launch(
        _radix_place_kernel,
        grid,
        affinities,
        threshold,
        needed,
        *counts,
        slots,
        weights,
        plan.token_indices,
        scale,
        groups,
        size,
        chunks,
        capacity,
        NUM_EXPERTS=experts,
        CHUNK=CHUNK,
        COUNTS=_COUNTS,
        num_warps=8,
    )
