"""One entry: build the providers, check them, time them in turns, weigh the goals."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import memory, op_counts
from benchmarks.check import OURS, Verdict, first_line, judge
from benchmarks.entry import MODES, Entry, Inputs, Run, Stage
from benchmarks.gpu.calls import call_of
from benchmarks.limits import limit_seconds
from benchmarks.ratios import Summary, ratios, slower, summarize
from benchmarks.stages import STAGES
from benchmarks.timing import measure, sampler

NOT_COMPILED = "torch.compile was left out: --no-compile, no C++ compiler, or too little time"


@dataclass(frozen=True)
class Settings:
    """How long and what to measure; the values are the command's options."""

    repeats: int = 40
    seconds: float = 3.0
    modes: tuple[str, ...] = MODES
    compiled: bool = True
    memory: bool = True


def run_entry(entry: Entry, settings: Settings) -> dict[str, Any]:
    """Result of one entry, ready for JSON; nothing is timed when ours is wrong."""
    stage, began = STAGES[entry.stage], time.monotonic()
    inputs = stage.make_inputs(entry.shape, entry.torch_dtype)
    if settings.compiled:
        torch.compiler.reset()  # code of other entries counts towards the recompilation limit
    runs = {name: _build(stage, name, inputs, settings) for name in entry.providers}
    verdicts = judge(stage, inputs, runs, entry.torch_dtype)
    result: dict[str, Any] = {
        "name": entry.name,
        "stage": entry.stage,
        "shape": dict(entry.shape),
        "dtype": entry.dtype,
        "device": "cpu",
        "axis": axis_of(entry),
        "providers": {
            name: {"kind": stage.providers[name].kind, **asdict(verdict)}
            for name, verdict in verdicts.items()
        },
        "modes": {},
        "calls": {},
        "memory": {},
        "goals": [],
        "slower": [],
    }
    if "load" in inputs.fixed:  # the largest share of the tokens that one expert has, times E
        result["load"] = inputs.fixed["load"]
    if verdicts["ours"].timed:
        for mode in [mode for mode in entry.modes if mode in settings.modes]:
            result["modes"][mode] = _time(entry, stage, inputs, runs, verdicts, mode, settings)
        result["calls"] = _calls(result, stage, inputs, runs, verdicts)
        if settings.memory:
            result["memory"] = _memory(entry, verdicts)
        weigh(entry, stage, result)
    result["seconds"] = time.monotonic() - began
    return result


def axis_of(entry: Entry) -> dict[str, Any] | None:
    """Where the entry stands in a series, as the result says it."""
    return None if entry.axis is None else asdict(entry.axis)


def failed(result: dict[str, Any]) -> bool:
    """Whether ours, or one of its backends, is wrong."""
    verdicts = result["providers"].values()
    return any(found["kind"] in OURS and found["status"] == "wrong" for found in verdicts)


def _build(stage: Stage, name: str, inputs: Inputs, settings: Settings) -> Run | str:
    provider = stage.providers[name]
    if provider.compiled and not settings.compiled:
        return NOT_COMPILED
    try:
        return provider.build(inputs)
    except Exception as error:
        return first_line(error)


def _time(
    entry: Entry,
    stage: Stage,
    inputs: Inputs,
    runs: dict[str, Run | str],
    verdicts: dict[str, Verdict],
    mode: str,
    settings: Settings,
) -> dict[str, Any]:
    samplers = {
        name: sampler(run, inputs, mode)
        for name, run in runs.items()
        if isinstance(run, Run)
        and verdicts[name].timed
        and (mode == "forward" or not stage.providers[name].forward_only)
    }
    samples = measure(samplers, repeats=settings.repeats, seconds=settings.seconds)
    cost = stage.cost(entry.shape, entry.torch_dtype.itemsize, mode)
    return {
        "rounds": len(samples["ours"]),
        "limit": limit_seconds(cost, entry.torch_dtype),
        "cost": asdict(cost),
        "times": {name: asdict(summarize(values)) for name, values in samples.items()},
        "ratios": {name: asdict(summary) for name, summary in ratios(samples).items()},
    }


def _calls(
    result: dict[str, Any],
    stage: Stage,
    inputs: Inputs,
    runs: dict[str, Run | str],
    verdicts: dict[str, Verdict],
) -> dict[str, Any]:
    """Operators of one call of the last timed mode that is not the backward alone."""
    found: dict[str, Any] = {}
    modes = [mode for mode in result["modes"] if mode != "backward"]
    for name, run in runs.items():
        provider = stage.providers[name]
        # Compiled code is not dispatched while operators are counted.
        if not modes or isinstance(run, str) or not verdicts[name].timed or provider.compiled:
            continue
        mode = "forward" if provider.forward_only else modes[-1]
        found[name] = {"mode": mode, **op_counts.count(call_of(run, inputs, mode))}
    return found


def _memory(entry: Entry, verdicts: dict[str, Verdict]) -> dict[str, Any]:
    return {
        name: memory.in_fresh_processes(entry, name, torch.get_num_threads())
        for name in entry.memory
        if verdicts[name].timed
    }


def weigh(entry: Entry, stage: Stage, result: dict[str, Any]) -> None:
    """Fill in which goals are met and which alternatives are faster than ours."""
    for goal in entry.goals:
        ratio = _ratio(result, goal.mode, goal.against)
        if ratio is not None:
            result["goals"].append(
                {
                    "mode": goal.mode,
                    "against": goal.against,
                    "wanted": goal.words(),
                    "ratio": ratio,
                    "met": goal.met(ratio),
                }
            )
    plain = [name for name in entry.providers if stage.providers[name].kind == "plain"]
    for mode, found in result["modes"].items():
        summaries = {name: Summary(**ratio) for name, ratio in found["ratios"].items()}
        for name, ratio in slower(summaries, plain).items():
            result["slower"].append({"mode": mode, "provider": name, "ratio": ratio})


def _ratio(result: dict[str, Any], mode: str, against: str) -> float | None:
    """other/ours of a time or of a size, ``None`` when it was not measured."""
    if mode in ("memory", "saved"):
        key = {"memory": "peak_bytes", "saved": "saved_bytes"}[mode]
        sizes = {name: found.get(key) for name, found in result["memory"].items()}
        if sizes.get(against) and sizes.get("ours"):
            return float(sizes[against] / sizes["ours"])
        return None
    found = result["modes"].get(mode, {}).get("ratios", {}).get(against)
    return None if found is None else float(found["median"])
