"""Entries on a CUDA device inside a run of ``benchmarks.run``, in a process of their own."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.entry import Entry
from benchmarks.gpu import first_steps, supervise
from benchmarks.runner import Settings

# Without a limit of time; an entry that hangs is ended by itself.
A_DAY = 86400.0
# Compiling, side by side and before anything is timed: at most this, and this share of the time.
FIRST_SECONDS, FIRST_SHARE = 120.0, 0.25


def first_calls(entries: Sequence[Entry], seconds: float) -> dict[str, dict[str, float]]:
    """Seconds of a first call with empty caches, by entry; fills the caches for the others.

    Args:
        entries: that are measured later.
        seconds: for all of the GPU's half.
    """
    steps = first_steps.FirstSteps(tests=False)
    return first_steps.first_calls(steps.run(entries, min(FIRST_SECONDS, FIRST_SHARE * seconds)))


def measure(
    names: Sequence[str],
    suite: str,
    device: str,
    settings: Settings,
    seconds: float,
    report: Callable[[dict[str, Any]], None],
) -> supervise.Measured:
    """Measure entries of a suite in this order.

    Args:
        names: of the entries.
        suite: that has them.
        device: ``"cuda"``, or ``"cpu"`` for a rehearsal.
        settings: how long and what to measure.
        seconds: for all of them, may be infinite.
        report: called with each result as it comes.
    """
    arguments = ["--suite", suite, "--device", device, "--repeats", str(settings.repeats)]
    arguments += ["--rounds-seconds", str(settings.seconds), "--modes", *settings.modes]
    if not settings.compiled:
        arguments.append("--no-compile")
    if not settings.memory:
        arguments.append("--no-memory")
    return supervise.run_entries(names, arguments, min(seconds, A_DAY), report=report)
