"""Runs the steps of a suite in their order, for as long as the time lasts."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import estimate, output, table
from benchmarks.budget import Budget, OutOfTime, at_most
from benchmarks.check import first_line
from benchmarks.entry import CPU, Entry
from benchmarks.gpu import half, supervise
from benchmarks.gpu import runner as gpu_runner
from benchmarks.gpu import table as gpu_table
from benchmarks.parts import Context, Part
from benchmarks.runner import Settings, run_entry
from benchmarks.stages import STAGES
from benchmarks.suites import Step

# Of the rate of a large product, what whole layers reach.
EFFICIENCY = 0.5
# What takes so much longer than estimated is stuck; a part is known better than an entry.
ENTRY_PATIENCE, PART_PATIENCE = 4.0, 2.0
MIN_PATIENCE_SECONDS = 60.0
PROFILE_SECONDS = 15.0  # of one entry
# An entry that would compile for more than this share of what is left does not compile.
COMPILE_SHARE = 1 / 3


@dataclass
class Session:
    """One run: what it measures, what it found.

    Attributes:
        document: of the results; ``entries``, ``not_measured`` and the parts' lists grow.
        folder: that ``results.json`` is written to after every step.
        settings: how long and what to measure.
        budget: the time of the run.
        broken: names of what ended with an error.
    """

    document: dict[str, Any]
    folder: Path
    settings: Settings
    budget: Budget
    broken: list[str] = field(default_factory=list)
    experience: estimate.Experience = field(default_factory=estimate.Experience)

    def on_cpu(self, steps: Sequence[Step]) -> None:
        """Run steps on the CPU."""
        print(table.line(table.COLUMNS))
        for step in steps:
            if isinstance(step, Entry):
                self._step(step, self._entry)
            else:
                self._step(step, self._part, is_last=step is steps[-1])

    def rehearse(self, entries: Sequence[Entry]) -> None:
        """Run a GPU's entries on the CPU, here and in the GPU's way."""
        bench = gpu_runner.Bench.on(CPU, self.settings)
        print(gpu_table.line(gpu_table.COLUMNS))
        for entry in entries:
            self._step(entry, lambda entry, _: self._gpu_done(gpu_runner.run_entry(entry, bench)))

    def on_gpu(self, steps: Sequence[Step], suite: str, seconds: float) -> None:
        """Run entries on the CUDA device, in processes of their own, for so long at most."""
        try:
            self._on_gpu(steps, suite, seconds)
        except Exception as error:  # the CPU is still to be measured
            self.broken.append("the GPU's half")
            self._leave_out("the GPU's half", first_line(error))
        output.write(self.folder, self.document, indent=None)

    def _on_gpu(self, steps: Sequence[Step], suite: str, seconds: float) -> None:
        end = self.budget.spent + seconds
        entries = [step for step in steps if isinstance(step, Entry)]
        for step in steps:
            if isinstance(step, Part):
                self._leave_out(step.name, "measured on a CPU only: --device cpu")
        if self.settings.compiled and suite == "gpu":
            self.document["first_call"] = half.first_calls(entries, seconds)
        print(gpu_table.line(gpu_table.COLUMNS))
        names = [entry.name for entry in entries]
        left = max(end - self.budget.spent, 0.0)
        measured = half.measure(names, suite, "cuda", self.settings, left, self._gpu_done)
        self.document["rates"] |= measured.rates
        self.document["settings"] |= measured.rates
        self.document["not_measured"] += measured.not_measured
        self.broken += [
            item["name"]
            for item in measured.not_measured
            if item["reason"] != supervise.OUT_OF_TIME
        ]

    def profile(self, entries: Sequence[Entry], device: torch.device) -> None:
        """Write chrome traces of ours and of the strongest plain alternative that was measured."""
        for result in list(self.document["entries"]):
            entry = next((entry for entry in entries if entry.name == result["name"]), None)
            if entry is not None and result["modes"]:
                run = partial(self._profiled, entry, device, ["ours", *strongest(result)])
                part = Part(f"profile of {entry.name}", PROFILE_SECONDS, run, "")
                self._step(part, self._part)

    def _profiled(
        self, entry: Entry, device: torch.device, providers: list[str], context: Context
    ) -> Iterator[str]:
        from benchmarks import profiling

        found = profiling.profile_entry(entry, device, providers, self.folder)
        context.document["stages"] += found
        yield from profiling.table_lines(found)

    def _gpu_done(self, result: dict[str, Any]) -> None:
        self.document["entries"].append(result)
        output.write(self.folder, self.document, indent=None)
        print("\n".join(gpu_table.line(row) for row in gpu_table.rows(result)), flush=True)

    def _step(self, step: Any, run: Callable[[Any, float], None], is_last: bool = False) -> None:
        """Run a step when time and memory allow it; note what became of it.

        Args:
            step: to run.
            run: does it, with the seconds that it may take.
            is_last: it is a part, and what remains of the time is for it: some of it is better
                than nothing.
        """
        estimated = self._estimate(step)
        reason = self._why_not(step, 0.0 if is_last else estimated)
        if reason is not None:
            self._leave_out(step.name, reason)
            return
        try:
            allowed = self._allowed(step, estimated)
            with at_most(allowed):
                run(step, allowed)
        except OutOfTime as error:
            kept = "; what it had by then is kept" if isinstance(step, Part) else ""
            self._leave_out(step.name, f"{error}{kept}")
        except Exception as error:
            # A part may want what is not installed; an entry leaves such a provider out.
            if not (isinstance(step, Part) and isinstance(error, ImportError)):
                self.broken.append(step.name)
            self._leave_out(step.name, first_line(error))
        output.write(self.folder, self.document, indent=None)

    def _estimate(self, step: Step) -> float:
        if isinstance(step, Part):
            return step.seconds
        settings = self._settings_for(step)
        corrected = self.experience.correct(self._uncorrected(step, settings))
        return corrected + estimate.memory_seconds(step, self.settings)

    def _uncorrected(self, entry: Entry, settings: Settings) -> float:
        product = self.document["rates"].get("product", {}).get(entry.dtype)
        flops = EFFICIENCY * product if product else estimate.FLOPS
        return estimate.entry_seconds(entry, settings, flops)

    def _settings_for(self, entry: Entry) -> Settings:
        """Those of the run, without compiled peers where they would take too much of the rest."""
        without = replace(self.settings, compiled=False)
        compiling = self._uncorrected(entry, self.settings) - self._uncorrected(entry, without)
        too_long = self.experience.correct(compiling) > COMPILE_SHARE * self.budget.left
        return without if too_long else self.settings

    def _allowed(self, step: Step, estimated: float) -> float:
        """Seconds after which a step is ended; infinite in a run without a limit."""
        if self.budget.seconds is None:
            return math.inf
        patience = PART_PATIENCE if isinstance(step, Part) else ENTRY_PATIENCE
        return min(self.budget.left, max(patience * estimated, MIN_PATIENCE_SECONDS))

    def _why_not(self, step: Step, seconds: float) -> str | None:
        if self.budget.left < 1:
            return "no time was left"
        if seconds > self.budget.left:
            return f"needs about {seconds:.0f} s; {self.budget.left:.0f} s were left"
        if isinstance(step, Part):
            return None
        return estimate.why_not(step, estimate.available_bytes())

    def _leave_out(self, name: str, reason: str) -> None:
        self.document["not_measured"].append({"name": name, "reason": reason})
        print(f"{name}: not measured: {reason}", flush=True)

    def _entry(self, entry: Entry, allowed: float) -> None:
        settings = self._settings_for(entry)
        result = run_entry(entry, settings)
        self.document["entries"].append(result)
        if not result["memory"]:
            self.experience.add(self._uncorrected(entry, settings), result["seconds"])
        print("\n".join(table.line(row) for row in table.rows(result)), flush=True)

    def _part(self, part: Part, allowed: float) -> None:
        for line in part.run(Context(self.settings, allowed, self.document)):
            print(line, flush=True)
            output.write(self.folder, self.document, indent=None)


def strongest(result: dict[str, Any]) -> list[str]:
    """The plain alternative that was fastest in the last mode, uncompiled: its operators show.

    None when there is none.
    """
    times = list(result["modes"].values())[-1]["times"] if result["modes"] else {}
    stage = STAGES[result["stage"]]
    plain = [
        name
        for name in times
        if stage.providers[name].kind == "plain" and not stage.providers[name].compiled
    ]
    return [min(plain, key=lambda name: float(times[name]["median"]))] if plain else []
