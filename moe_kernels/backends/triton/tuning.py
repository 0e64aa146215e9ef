"""Measuring configs inside a real layer: what ``moe_kernels.warmup(..., tune=True)`` does."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from triton.runtime.errors import OutOfResources

from moe_kernels.backends.triton import configs, tuning_cache
from moe_kernels.backends.triton.config_table import CANDIDATES, Config
from moe_kernels.backends.triton.configs import Key

# A config must be this much faster than the shipped one to replace it: less is noise.
WORTH = 0.98
RUNS = 10


def tune(step: Callable[[], object], device: torch.device) -> dict[Key, Config]:
    """Find the fastest config of each product that ``step`` runs, and keep them on disk.

    One product at a time is changed while the whole step is timed, so that each is judged with the
    cache and the neighbours it really has.

    Args:
        step: runs a layer forward and backward.
        device: of its tensors.

    Returns:
        The configs that replaced shipped ones.
    """
    if not tuning_cache.enabled():
        return {}
    best: dict[Key, Config] = {}
    with configs.tried({}) as trial:
        step()
    for key, shipped in trial.seen.items():
        fastest = _measure(step, device, {**best, key: shipped})
        assert fastest is not None
        limit = fastest * WORTH
        for candidate in _candidates(key, shipped):
            seconds = _measure(step, device, {**best, key: candidate})
            if seconds is not None and seconds < limit:
                best[key], limit = candidate, seconds
    for arch in {key.arch for key in best}:
        entries = {
            tuning_cache.key_of(key.product, *key[2:]): config
            for key, config in best.items()
            if key.arch == arch
        }
        tuning_cache.store(arch, entries)
    configs.forget()
    return best


def describe(tuned: dict[Key, Config]) -> list[str]:
    """A line for each replaced config."""
    return [f"{tuning_cache.key_of(key.product, *key[2:])}: {c}" for key, c in tuned.items()]


def _candidates(key: Key, shipped: Config) -> list[Config]:
    as_shipped = partial(replace, persistent=shipped.persistent, blocks=shipped.blocks)
    fitted = [configs.fit(as_shipped(config), key) for config in CANDIDATES]
    return [config for config in dict.fromkeys(fitted) if config != shipped]


def _measure(
    step: Callable[[], object], device: torch.device, chosen: dict[Key, Config]
) -> float | None:
    """Median seconds of a step; ``None`` for a config that does not fit the GPU."""
    with configs.tried(chosen):
        try:
            step()
        except OutOfResources:
            return None
        return statistics.median(_time(step, device) for _ in range(RUNS))


def _time(step: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
