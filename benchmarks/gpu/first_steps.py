"""What ``gpu-check`` does before it measures: tests, a cold first call, and filled code caches.

All of it waits for compilers most of the time, so it runs side by side, in processes of its own.
compute-sanitizer comes last: where the time is short, it gets none.
"""

import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.entry import Entry
from benchmarks.environment import ROOT
from benchmarks.gpu import sanitize
from benchmarks.gpu.jobs import Job, Outcome, run_jobs
from benchmarks.stages import STAGES

# Tests for a GPU alone, and those that also run in Triton's interpreter.
MARKER = re.compile(r"pytest\.mark\.gpu\b|^from \.gpu_cases import", re.MULTILINE)
WARMED_STAGES = ("ec_layer", "dit_moe_layer")
FIRST_CALL_ENTRY = "ec_layer"
MOST_WARMED = 6  # they share the GPU's memory


@dataclass(frozen=True)
class FirstSteps:
    """Which of them to take.

    Attributes:
        tests: the files that have tests for a GPU, each in a process.
        first_calls: a cold call, and warm caches for the layers that are measured later.
        tiny: everything at tiny shapes on the CPU.
        sanitizer: path of compute-sanitizer; ``None`` leaves it out.
    """

    tests: bool = True
    first_calls: bool = True
    tiny: bool = False
    sanitizer: str | None = None

    def run(self, entries: Sequence[Entry], seconds: float) -> dict[str, Outcome]:
        """Every job's outcome by name.

        The names: a test file, ``first call <entry>``, ``warm <entry>``, and those of ``sanitize``.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
        with tempfile.TemporaryDirectory() as empty:
            jobs = self._test_jobs() if self.tests else []
            if self.first_calls:
                jobs += self._call_jobs(entries, empty)
            if self.sanitizer is not None:
                jobs += sanitize.jobs(self.sanitizer)
            return run_jobs(jobs, at_once=max(2, cores), seconds=seconds, folder=ROOT)

    def _test_jobs(self) -> list[Job]:
        options = ["-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "-rfE"]
        return [
            Job(name, [sys.executable, "-m", "pytest", *options, name]) for name in test_files()
        ]

    def _call_jobs(self, entries: Sequence[Entry], empty: str) -> list[Job]:
        command = [sys.executable, "-m", "benchmarks.gpu.first_call"]
        options = ["--tiny", "--device", "cpu"] if self.tiny else []
        layers = [entry for entry in entries if _compiles(entry)][:MOST_WARMED]
        cold = [entry.name for entry in layers if entry.stage == FIRST_CALL_ENTRY][:1]
        environment = {**os.environ, "TRITON_CACHE_DIR": empty, "TORCHINDUCTOR_CACHE_DIR": empty}
        jobs = [Job(f"first call {name}", [*command, name, *options], environment) for name in cold]
        if not self.tiny:
            jobs += [
                Job(f"warm {entry.name}", [*command, entry.name, "--warm", *options])
                for entry in layers
            ]
        return jobs


def _compiles(entry: Entry) -> bool:
    """Whether it is a layer, outside a series, with a peer that needs ``torch.compile``."""
    if entry.stage not in WARMED_STAGES or entry.axis is not None:
        return False
    providers = STAGES[entry.stage].providers
    return any(providers[name].compiled for name in entry.providers)


def test_files() -> list[str]:
    """Test files with tests for a GPU; only they are collected, the others may need extras."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if MARKER.search(path.read_text()):
            found.append(str(path.relative_to(ROOT)))
    return found


def test_results(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Words, seconds and whether it failed, of every test file."""
    found: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        if not name.startswith("tests"):
            continue
        words, failed = outcome.last_line[:200], outcome.status not in (0, 5)
        if outcome.status is None:
            words = f"stopped after {outcome.seconds:.0f} s"
        elif importlib.util.find_spec("pytest") is None:
            words = "pytest is not installed"
        found[name] = {"words": words, "seconds": outcome.seconds, "failed": failed}
    return found


def first_calls(outcomes: dict[str, Outcome]) -> dict[str, dict[str, float]]:
    """Seconds of the cold calls that ended well, by entry."""
    found = {}
    for name, outcome in outcomes.items():
        # Compiler processes may have the last word.
        lines = [line for line in outcome.output.splitlines() if line.startswith("{")]
        if name.startswith("first call ") and outcome.status == 0 and lines:
            found[name.removeprefix("first call ")] = json.loads(lines[-1])
    return found
