"""Measuring configs inside a real layer: what ``moe_kernels.warmup(..., tune=True)`` does."""

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from triton.errors import TritonError

from moe_kernels.backends.triton import configs, tuning_cache
from moe_kernels.backends.triton.config_table import CANDIDATES, Config
from moe_kernels.backends.triton.configs import Key

# A config must be this much faster than the present one to replace it: less is noise.
WORTH = 0.98
ROUNDS = 7
STEPS = 3  # in a row, behind a pause of the GPU in which the host gets ahead of them
PAUSE_CYCLES = 40_000_000  # about 20 ms


def tune(step: Callable[[], object], device: torch.device) -> dict[Key, Config]:
    """Find the fastest config of each product that ``step`` runs, and keep them on disk.

    One product at a time is changed while the whole step is timed, so that each is judged with the
    cache and the neighbours it really has. fp32 products are left as they are: their time depends
    on whether TF32 is allowed.

    Args:
        step: runs a layer forward and backward.
        device: of its tensors.

    Returns:
        The configs that were replaced.
    """
    if not tuning_cache.enabled():
        return {}
    best: dict[Key, Config] = {}
    with _on(device):
        with configs.tried({}) as trial:
            step()
        for key, present in trial.seen.items():
            if key.dtype == torch.float32 and device.type == "cuda":
                continue
            winner = _winner(step, device, best, key, present)
            if winner != present:
                best[key] = winner
                entry = {tuning_cache.key_of(key.product, *key[2:]): winner}
                tuning_cache.store(key.arch, entry)
    configs.forget()
    return best


def describe(tuned: dict[Key, Config]) -> list[str]:
    """A line for each replaced config."""
    return [f"{tuning_cache.key_of(key.product, *key[2:])}: {c}" for key, c in tuned.items()]


def _winner(
    step: Callable[[], object],
    device: torch.device,
    best: dict[Key, Config],
    key: Key,
    present: Config,
) -> Config:
    """The fastest candidate if it also wins a second time, in turns; else the present config."""
    seconds = {}
    for candidate in _candidates(key, present):
        chosen = {**best, key: candidate}
        if _compiles(step, chosen):
            seconds[candidate] = statistics.median(_rounds(step, device, [chosen])[0])
    if not seconds:
        return present
    fastest = min(seconds, key=lambda candidate: seconds[candidate])
    pair = [{**best, key: present}, {**best, key: fastest}]
    old, new = _rounds(step, device, pair)
    ratio = statistics.median(n / o for n, o in zip(new, old, strict=True))
    return fastest if ratio < WORTH else present


def _candidates(key: Key, present: Config) -> list[Config]:
    """Configs to try, the shipped one among them where an earlier tuning replaced it."""
    shipped = configs.shipped(key.arch, key.dtype)[key.product][key.bucket]
    as_shipped = partial(replace, persistent=shipped.persistent, blocks=shipped.blocks)
    tried = [shipped, *map(as_shipped, CANDIDATES)]
    fitted = dict.fromkeys(configs.fit(config, key) for config in tried)
    return [config for config in fitted if config != present]


def _compiles(step: Callable[[], object], chosen: dict[Key, Config]) -> bool:
    """Run once; false for a config that does not fit the GPU or that the compiler refuses."""
    with configs.tried(chosen):
        try:
            step()
        except TritonError:
            return False
        except RuntimeError as error:  # a pass of the compiler that gave up
            if "PassManager" not in str(error):
                raise
            return False
    return True


def _rounds(
    step: Callable[[], object], device: torch.device, choices: list[dict[Key, Config]]
) -> list[list[float]]:
    """Seconds of a step in each round, for each choice; the choices take turns."""
    seconds: list[list[float]] = [[] for _ in choices]
    for _ in range(ROUNDS):
        for chosen, times in zip(choices, seconds, strict=True):
            with configs.tried(chosen):
                times.append(_time(step, device))
    return seconds


def _time(step: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(PAUSE_CYCLES)  # PyTorch's own tests wait with it; there is no public name
    begin.record()
    for _ in range(STEPS):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / STEPS


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
