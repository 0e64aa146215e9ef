"""Calls under torch.profiler, and their time by stage and by name."""

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from benchmarks.profiling.lookup import Called, Sizes, stage_of_kernel, stage_of_operators
from benchmarks.profiling.names import COMPILED_PREFIXES
from moe_kernels import ops
from moe_kernels.distributed import search
from moe_kernels.ops.operator import Operator

CALLS = 5
RANGE = "benchmarks: one call"
LIBRARY = "moe_kernels::"
QUIET = "6"  # above every level of Kineto's log


class Spent:
    """Seconds of one call by stage, and by name and stage with how often.

    Attributes:
        stages: seconds by stage; they sum up to the call.
        names, numbers: seconds, and how many, by (name, stage).
    """

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.names: dict[tuple[str, str], float] = {}
        self.numbers: dict[tuple[str, str], int] = {}

    @property
    def seconds(self) -> float:
        """Of the whole call."""
        return sum(self.stages.values())

    def add(self, name: str, stage: str, microseconds: float) -> None:
        """Count one event."""
        key, seconds = (name, stage), microseconds * 1e-6
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds
        self.names[key] = self.names.get(key, 0.0) + seconds
        self.numbers[key] = self.numbers.get(key, 0) + 1

    def of_one_in(self, calls: int) -> "Spent":
        """The mean of so many calls, whose events were all counted."""
        mean = Spent()
        mean.stages = {stage: seconds / calls for stage, seconds in self.stages.items()}
        mean.names = {key: seconds / calls for key, seconds in self.names.items()}
        mean.numbers = {key: round(number / calls) for key, number in self.numbers.items()}
        return mean


def record(call: Callable[[], object], device: torch.device) -> Any:
    """The profile of ``CALLS`` calls in ranges; others before them warm up."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    wait = torch.cuda.synchronize if on_cuda else _nothing
    if not on_cuda:  # two lines a profile, and CUPTI's errors, which a CPU has not
        os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
    call()
    wait()
    with _ours_named(), torch.profiler.profile(activities=activities, record_shapes=True) as found:
        call()  # sets the profiler up
        for _ in range(CALLS):
            wait()
            with record_function(RANGE):
                call()
        wait()
    return found


def spent_on_cpu(events: Sequence[Any], sizes: Sizes) -> Spent:
    """The call of median duration; what is inside no operator is ``between operators``."""
    calls: dict[int, Spent] = {}
    for event in events:
        chain, around = _chain(event)
        if around is not None:
            spent = calls.setdefault(id(around), Spent())
            name = event.name if chain else "(no operator)"
            spent.add(name, stage_of_operators(chain, sizes), event.self_cpu_time_total)
    return sorted(calls.values(), key=lambda spent: spent.seconds)[len(calls) // 2]


def spent_on_gpu(events: Sequence[Any], sizes: Sizes) -> Spent:
    """The mean call, of what ran on the GPU; gaps between kernels are not in it.

    Raises:
        RuntimeError: when the profiler saw no kernels.
    """
    began = min(event.time_range.start for event in events if event.name == RANGE)
    # Operators know what they started; the backward's run in a thread without the range.
    started: dict[tuple[str, float], list[list[Called]]] = {}
    in_calls = [event for event in events if event.time_range.start >= began]
    for event in in_calls:
        for kernel in event.kernels:
            started.setdefault((kernel.name, kernel.duration), []).append(_chain(event)[0])
    spent = Spent()
    for event in filter(_is_kernel, in_calls):
        microseconds = event.time_range.elapsed_us()
        chains = started.get((event.name, microseconds))
        stage = stage_of_kernel(event.name, chains.pop() if chains else [], sizes)
        spent.add(event.name, stage, microseconds)
    if not spent.names:
        raise RuntimeError("the profiler saw no kernels (CUPTI is missing or not permitted)")
    return spent.of_one_in(CALLS)


def _is_kernel(event: Any) -> bool:
    """A kernel, copy or fill on the GPU, and no range that the profiler repeats there."""
    return (
        event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith((RANGE, LIBRARY, *COMPILED_PREFIXES))
        and not event.name.endswith((" Sync", "Synchronize", "Wait Event"))
    )


def longest(spent: Spent, number: int) -> list[dict[str, Any]]:
    """The operators or kernels that take the most time of a call by themselves."""
    ranked = sorted(spent.names.items(), key=lambda item: -item[1])[:number]
    return [
        {"name": key[0][:120], "stage": key[1], "number": spent.numbers[key], "seconds": seconds}
        for key, seconds in ranked
    ]


def _chain(event: Any) -> tuple[list[Called], Any]:
    """The event and its callers up to the range of the call, and that range if there is one."""
    chain: list[Called] = []
    while event is not None and event.name != RANGE:
        chain.append(Called(event.name, event.input_shapes or ()))
        event = event.cpu_parent
    return chain, event


@contextmanager
def _ours_named() -> Iterator[None]:
    """Ranges around ops that plain eager code calls without autograd: no dispatcher names them."""
    found = [
        (operator, variant) for operator in operators() for variant in operator.variants.values()
    ]
    before = [variant._inference for _, variant in found]

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with record_function(LIBRARY + name):
                return function(*args)

        return run

    for operator, variant in found:
        variant._inference = named(operator.name, variant._inference)
    try:
        yield
    finally:
        for (_, variant), function in zip(found, before, strict=True):
            variant._inference = function


def operators() -> list[Operator]:
    """Every op of the library, also those between processes."""
    modules = [
        importlib.import_module(f"{ops.__name__}.{found.name}")
        for found in pkgutil.iter_modules(ops.__path__)
    ]
    modules.append(search)
    values = (value for module in modules for value in vars(module).values())
    return list({id(value): value for value in values if isinstance(value, Operator)}.values())


def _nothing() -> None:
    """A CPU is not waited for."""
