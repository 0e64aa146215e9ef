"""What one timed call of a provider is, in each mode, over several sets of inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.entry import Inputs, Run
from benchmarks.gradients import differentiable, upstream_of


@dataclass(frozen=True)
class Call:
    """One call over one set of inputs.

    Attributes:
        prepare: what is done before the clock starts; its result goes to ``run``.
        run: what is timed; the clock has stopped before its result is freed.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]

    def __call__(self) -> Any:
        return self.run(self.prepare())


def call_of(run: Run, inputs: Inputs, mode: str) -> Call:
    """``"forward"`` without gradients, ``"backward"`` of a graph built before, or ``"both"``."""
    count, leaves = differentiable(run, inputs), run.flat_leaves
    if mode == "forward":
        return Call(lambda: None, lambda _: _without_gradients(run))
    upstream = upstream_of(run, inputs, run.call()[:count])
    if mode == "backward":
        return Call(
            lambda: run.call()[:count],
            lambda outputs: torch.autograd.grad(outputs, leaves, upstream),
        )
    assert mode == "both", mode
    return Call(lambda: None, lambda _: torch.autograd.grad(run.call()[:count], leaves, upstream))


def _without_gradients(run: Run) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return run.call()
