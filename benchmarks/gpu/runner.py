"""One entry on a GPU: inputs, correctness, rounds, graphs, probes, memory, goals."""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.check import CEILING, Verdict, compare, first_line, hold_ours_to_plain, truth
from benchmarks.entry import Entry, Inputs, Run, Stage
from benchmarks.gpu import probes
from benchmarks.gpu.calls import Call, call_of
from benchmarks.gpu.clock import Clock, clock_of
from benchmarks.gpu.figures import figures_of, weigh_figures
from benchmarks.gpu.graph import graph_time
from benchmarks.gpu.hardware import QUERY, query
from benchmarks.gpu.limits import Limits
from benchmarks.gpu.time_limit import time_limit
from benchmarks.gpu.timing import measure
from benchmarks.ratios import ratios, summarize
from benchmarks.runner import NOT_COMPILED, Settings, axis_of, weigh
from benchmarks.stages import STAGES

# Sets of inputs rotate while all of them stay below this; a larger one fills the cache alone.
ROTATED_BYTES = 2**28
MAX_SETS = 4
# Calls shorter than this on the device are also timed in a graph: launches may be most of them.
LAUNCH_BOUND_SECONDS = 3e-4

Runs = dict[str, list[Run]]


@dataclass(frozen=True)
class Bench:
    """What the entries of one run share.

    Attributes:
        clock, limits: of the device.
        settings: how long and what to measure.
        now: seconds, for what the host waits for.
        provider_seconds: what a provider may take to compile, tune itself and be compared.
    """

    clock: Clock
    limits: Limits
    settings: Settings
    now: Callable[[], float] = field(default=time.monotonic)
    provider_seconds: float = 90.0

    @classmethod
    def on(cls, device: torch.device, settings: Settings) -> "Bench":
        """For a device, with its clock; on a CPU with small products and copies."""
        clock = clock_of(device)
        sizes = () if device.type == "cuda" else (128, 2**16)
        return cls(clock, Limits(clock, *sizes), settings)


def run_entry(entry: Entry, bench: Bench) -> dict[str, Any]:
    """Result of one entry, ready for JSON; nothing is timed when ours is wrong."""
    stage, device, began = STAGES[entry.stage], bench.clock.device, bench.now()
    torch.compiler.reset()  # code of other entries counts towards the recompilation limit
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    sets = _input_sets(stage, entry, device)
    exact, precision = _truth(stage, sets[0])
    runs, verdicts, first_seconds = _compared(entry, stage, sets, exact, bench)
    del exact
    result: dict[str, Any] = {
        "name": entry.name,
        "stage": entry.stage,
        "shape": dict(entry.shape),
        "dtype": entry.dtype,
        "device": device.type,
        "axis": axis_of(entry),
        "truth": precision,
        "input_sets": len(sets),
        "providers": {
            name: {"kind": stage.providers[name].kind, **asdict(verdicts[name])}
            for name in entry.providers
        },
        "first_seconds": first_seconds,
        "modes": {},
        "probes": {},
        "memory": {},
        "goals": [],
        "slower": [],
        "figures": {},
        "figure_goals": [],
    }
    if "load" in sets[0].fixed:  # the largest share of the tokens that one expert has, times E
        result["load"] = sets[0].fixed["load"]
    if verdicts["ours"].timed:
        settings = bench.settings
        for mode in [mode for mode in entry.modes if mode in settings.modes]:
            result["modes"][mode] = _time(entry, stage, sets, runs, mode, bench)
        if device.type == "cuda":
            result["probes"] = _probed(entry, stage, sets[0], runs)
            if settings.memory:
                result["memory"] = _memory(entry, sets[0], runs)
        weigh(entry, stage, result)
        result["figures"] = figures_of(entry, stage, result, bench.limits)
        result["figure_goals"] = weigh_figures(entry, result["figures"])
    result["seconds"] = bench.now() - began
    return result


def _input_sets(stage: Stage, entry: Entry, device: torch.device) -> list[Inputs]:
    first = stage.make_inputs(entry.shape, entry.torch_dtype, device)
    size = sum(tensor.nbytes for tensor in (*first.leaves.values(), *first.upstream.values()))
    number = max(1, min(MAX_SETS, ROTATED_BYTES // max(size, 1)))
    others = (
        stage.make_inputs(entry.shape, entry.torch_dtype, device, seed) for seed in range(1, number)
    )
    return [first, *others]


def _truth(stage: Stage, inputs: Inputs) -> tuple[dict[str, Tensor], str]:
    """The truth and its precision: fp64, or fp32 where the device's memory does not hold that."""
    try:
        return truth(stage, inputs), "fp64"
    except torch.OutOfMemoryError:
        pass  # outside the handler, so that the failed attempt's tensors are freed
    torch.cuda.empty_cache()
    return truth(stage, inputs, torch.float32), "fp32"


def _compared(
    entry: Entry, stage: Stage, sets: list[Inputs], exact: dict[str, Tensor], bench: Bench
) -> tuple[Runs, dict[str, Verdict], dict[str, float]]:
    """Runs of the providers that may be timed, every verdict, seconds of their first calls."""
    runs: Runs = {}
    verdicts: dict[str, Verdict] = {}
    seconds: dict[str, float] = {}
    # Ours first: an alternative that breaks the device's context does not take ours with it.
    for name in sorted(entry.providers, key=lambda name: name != "ours"):
        provider, began = stage.providers[name], bench.now()
        if provider.compiled and not bench.settings.compiled:
            verdicts[name] = Verdict("skipped", reason=NOT_COMPILED)
            continue
        try:
            with time_limit(bench.provider_seconds):
                built = [provider.build(inputs) for inputs in sets]
                ceiling = CEILING[entry.torch_dtype]
                verdicts[name] = compare(provider, built[0], sets[0], exact, ceiling)
        except Exception as error:
            status = "wrong" if provider.kind == "ours" else "skipped"
            verdicts[name] = Verdict(status, reason=first_line(error))
        if verdicts[name].timed:
            runs[name] = built
        seconds[name] = bench.now() - began
    hold_ours_to_plain(stage, verdicts, entry.torch_dtype)
    timed = {name: runs[name] for name in entry.providers if verdicts[name].timed}
    return timed, verdicts, seconds


def _time(
    entry: Entry, stage: Stage, sets: list[Inputs], runs: Runs, mode: str, bench: Bench
) -> dict[str, Any]:
    calls: dict[str, list[Call]] = {
        name: [call_of(run, inputs, mode) for run, inputs in zip(built, sets, strict=True)]
        for name, built in runs.items()
        if mode == "forward" or not stage.providers[name].forward_only
    }
    settings, clock = bench.settings, bench.clock
    samples = measure(calls, clock, repeats=settings.repeats, seconds=settings.seconds)
    on_cuda = clock.device.type == "cuda"
    state = query(clock.device, QUERY) if on_cuda else {}
    times = {name: asdict(summarize(values)) for name, values in samples.device.items()}
    cost = stage.cost(entry.shape, entry.torch_dtype.itemsize, mode)
    found: dict[str, Any] = {
        "rounds": len(samples.device["ours"]),
        "limit": bench.limits.seconds(cost, entry.torch_dtype),
        "cost": asdict(cost),
        "times": times,
        "ratios": {name: asdict(ratio) for name, ratio in ratios(samples.device).items()},
        "host": {name: asdict(summarize(values)) for name, values in samples.host.items()},
        "graph": {},
        "state": state,
    }
    if on_cuda and mode != "backward" and times["ours"]["median"] < LAUNCH_BOUND_SECONDS:
        found["graph"] = {
            name: _in_graph(of_provider, clock) for name, of_provider in calls.items()
        }
    return found


def _in_graph(calls: list[Call], clock: Clock) -> dict[str, Any]:
    """Summary of the time in a graph, or why there is none."""
    if probes.host_syncs(calls[0]):  # recording it would fail, and leave the generator broken
        return {"reason": "waits for the device"}
    try:
        return asdict(graph_time(calls, clock))
    except RuntimeError as error:
        return {"reason": first_line(error)}


def _probed(entry: Entry, stage: Stage, inputs: Inputs, runs: Runs) -> dict[str, Any]:
    """What each provider does in one call of the last mode that it has."""
    found: dict[str, Any] = {}
    for name, built in runs.items():
        modes = [mode for mode in entry.modes if mode != "backward"] or ["both"]
        mode = "forward" if stage.providers[name].forward_only else modes[-1]
        call = call_of(built[0], inputs, mode)
        call()
        of_provider: dict[str, Any] = {"mode": mode, "host_syncs": probes.host_syncs(call)}
        if name == "ours":
            of_provider["sync_error"] = probes.sync_error(call)
        try:
            of_provider |= probes.kernels_of(call)
        except RuntimeError as error:
            of_provider["kernels_reason"] = first_line(error)
        if name != "ours":
            of_provider.pop("longest", None)
        found[name] = of_provider
    return found


def _memory(entry: Entry, inputs: Inputs, runs: Runs) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in entry.memory:
        if name in runs:
            found[name] = probes.memory_of(runs[name][0], inputs)
    return found
