"""What an entry will need, before it is run: seconds and bytes, both only about right."""

import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.entry import Entry, Stage
from benchmarks.memory import RUNS
from benchmarks.runner import Settings
from benchmarks.stages import STAGES
from benchmarks.timing import MIN_ROUNDS

# Rates of two cores, for when none were measured.
FLOPS = 1e11
BYTES = 5e9
CALL_SECONDS = 1e-3  # sorting, exponentials and the calls themselves, which no cost counts
COMPILE_SECONDS = 25.0
PROCESS_SECONDS = 4.0  # a new Python with PyTorch
WARMUP_CALLS = 4
# Corrections outside of these mean that something else is wrong.
LEAST, MOST = 0.2, 5.0


def entry_seconds(entry: Entry, settings: Settings, flops: float = FLOPS) -> float:
    """Checking and timing of every provider.

    Args:
        entry: to be run.
        settings: of the run.
        flops: operations a second that a layer reaches.
    """
    stage = STAGES[entry.stage]
    providers = [
        name for name in entry.providers if settings.compiled or not stage.providers[name].compiled
    ]
    compiled = sum(stage.providers[name].compiled for name in providers)
    step = _call_seconds(entry, stage, "both", flops)
    # fp64 is half as fast, and what it is computed by is slow; every provider is then run twice.
    seconds = 4 * step + 2 * step * len(providers) + COMPILE_SECONDS * compiled
    for mode in entry.modes:
        if mode in settings.modes:
            # A backward needs its forward, outside the clock.
            call = step if mode == "backward" else _call_seconds(entry, stage, mode, flops)
            fewest = (MIN_ROUNDS + WARMUP_CALLS) * len(providers) * call
            most = (settings.repeats + WARMUP_CALLS) * len(providers) * call
            seconds += max(fewest, min(settings.seconds, most))
    return seconds


def memory_seconds(entry: Entry, settings: Settings) -> float:
    """A few new processes for each provider, most of whose time is that of starting."""
    return RUNS * len(entry.memory) * PROCESS_SECONDS if settings.memory else 0.0


def _call_seconds(entry: Entry, stage: Stage, mode: str, flops: float) -> float:
    cost = stage.cost(entry.shape, entry.torch_dtype.itemsize, mode)
    return cost.flops / flops + cost.bytes / BYTES + CALL_SECONDS


def entry_bytes(entry: Entry) -> float:
    """Inputs, the truth in fp64 with its gradients, and one provider's activations."""
    shape, itemsize = entry.shape, entry.torch_dtype.itemsize
    stage = STAGES[entry.stage]
    elements = stage.cost(shape, 1, "forward").bytes
    # Inputs and gradients of a provider; the same in fp64.
    size = elements * (4 * itemsize + 2 * 8)
    flops = stage.cost(shape, itemsize, "forward").flops
    if "D" in shape:
        # Every element of an activation takes 2 D operations; some copies of each live in fp64.
        size += 4 * 8 * flops / (2 * shape["D"])
    if "one_hot" in entry.providers:
        # (G, S, E, C) with E C = 2 S, unless the shape says otherwise: two of them and a gradient.
        rows = shape.get("capacity_factor", 2) * shape["S"]
        size += 3 * itemsize * shape["B"] * shape["S"] * rows
    return float(size)


def available_bytes() -> float | None:
    """Memory that new processes can have, as Linux says it; ``None`` elsewhere."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return None if found is None else 1024.0 * int(found.group(1))


def why_not(entry: Entry, available: float | None) -> str | None:
    """Why the entry does not fit into the memory; ``None`` when it does."""
    needed = entry_bytes(entry)
    if available is None or needed < 0.8 * available:
        return None
    gib = 2**30
    return f"needs about {needed / gib:.1f} GiB; {available / gib:.1f} GiB are available"


@dataclass
class Experience:
    """How long the entries of this run took beside what was estimated.

    Attributes:
        estimated, measured: seconds of all of them.
    """

    estimated: float = 0.0
    measured: float = 0.0

    def add(self, estimated: float, measured: float) -> None:
        """Learn from one entry."""
        self.estimated += estimated
        self.measured += measured

    def correct(self, estimated: float) -> float:
        """The estimate times what those so far took of theirs."""
        if not self.estimated:
            return estimated
        return estimated * min(max(self.measured / self.estimated, LEAST), MOST)
