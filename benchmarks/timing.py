"""Interleaved timing of providers, with fresh graphs where only the backward is timed."""

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from benchmarks.entry import Inputs, Run
from benchmarks.gradients import differentiable, upstream_of

MIN_ROUNDS = 5
MIN_SAMPLE_SECONDS = 5e-4
MAX_INNER = 500  # graphs kept for one sample of a backward

Clock = Callable[[], float]
Sampler = Callable[[int], float]


def sampler(run: Run, inputs: Inputs, mode: str, clock: Clock = time.perf_counter) -> Sampler:
    """A function that runs ``mode`` a number of times and returns the seconds of all of them.

    Args:
        run: bound provider.
        inputs: whose random upstream gradients are used.
        mode: ``"forward"`` without gradients; ``"backward"`` of graphs built outside the clock;
            ``"both"``.
        clock: in seconds.
    """
    count, leaves = differentiable(run, inputs), run.flat_leaves
    upstream = upstream_of(run, inputs, run.call()[:count]) if mode != "forward" else []

    def forward(inner: int) -> float:
        with torch.no_grad():
            start = clock()
            for _ in range(inner):
                run.call()
            return clock() - start

    def backward(inner: int) -> float:
        graphs = [run.call()[:count] for _ in range(inner)]
        start = clock()
        for outputs in graphs:
            torch.autograd.grad(outputs, leaves, upstream)
        return clock() - start

    def both(inner: int) -> float:
        start = clock()
        for _ in range(inner):
            torch.autograd.grad(run.call()[:count], leaves, upstream)
        return clock() - start

    return {"forward": forward, "backward": backward, "both": both}[mode]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the collector out of the measurement."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def measure(
    samplers: Mapping[str, Sampler],
    *,
    repeats: int,
    seconds: float,
    min_sample: float = MIN_SAMPLE_SECONDS,
) -> dict[str, list[float]]:
    """Seconds per call of every provider in every round.

    Each round samples every provider once. It ends after ``repeats`` rounds or ``seconds``,
    whichever comes first, but not before ``MIN_ROUNDS``.
    """
    names = list(samplers)
    # What ran before decides what is in the caches, so everybody gets every predecessor.
    shuffle = random.Random(0)
    with no_garbage_collection():
        inner = {name: _inner(samplers[name], min_sample) for name in names}
        samples: dict[str, list[float]] = {name: [] for name in names}
        end = time.perf_counter() + seconds
        for number in range(max(repeats, MIN_ROUNDS)):
            for name in shuffle.sample(names, len(names)):
                samples[name].append(samplers[name](inner[name]) / inner[name])
            if number + 1 >= MIN_ROUNDS and time.perf_counter() > end:
                break
    return samples


def _inner(sample: Sampler, min_sample: float) -> int:
    """Warm up, and find how many calls make a sample long enough to be read."""
    sample(1)
    once = min(sample(1), sample(1))
    inner = min(MAX_INNER, max(1, math.ceil(min_sample / max(once, 1e-9))))
    if inner > 1:
        sample(inner)
    return inner
