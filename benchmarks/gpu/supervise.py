"""Runs the worker, and runs it again behind an entry that broke it, until the time is used up."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.gpu.jobs import stop

STALL_SECONDS = 240.0  # an entry that takes longer has hung; providers have limits of their own
POLL_SECONDS = 0.2
OUT_OF_TIME = "the time was used up"


@dataclass
class Measured:
    """What a supervised run found.

    Attributes:
        results: of entries, as of ``run_entry``.
        not_measured: ``{"name", "reason"}`` of the others.
        rates: of the device.
    """

    results: list[dict[str, Any]] = field(default_factory=list)
    not_measured: list[dict[str, str]] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)


def run_entries(
    names: Sequence[str],
    arguments: Sequence[str],
    seconds: float,
    *,
    command: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu.worker"),
    report: Callable[[dict[str, Any]], None] = lambda result: None,
    stall_seconds: float = STALL_SECONDS,
) -> Measured:
    """Measure entries in this order.

    Args:
        names: of entries.
        arguments: further ones of the worker.
        seconds: for all entries; a worker that exceeds them by half a minute is stopped.
        command: that starts a worker.
        report: called with each result as it comes.
        stall_seconds: after which an entry without a result has hung.
    """
    measured, pending = Measured(), list(names)
    deadline = time.monotonic() + seconds
    while pending and time.monotonic() < deadline - 1:
        before = len(pending)
        _one_worker(pending, arguments, deadline, command, report, stall_seconds, measured)
        if len(pending) == before:  # not one entry was done: there is no time, or it never starts
            break
    reason = OUT_OF_TIME if time.monotonic() > deadline - 10 else "the worker did not start it"
    measured.not_measured += [{"name": name, "reason": reason} for name in pending]
    return measured


def _one_worker(
    pending: list[str],
    arguments: Sequence[str],
    deadline: float,
    command: Sequence[str],
    report: Callable[[dict[str, Any]], None],
    stall_seconds: float,
    measured: Measured,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "lines.jsonl", Path(folder) / "log.txt"
        left = deadline - time.monotonic()
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                [*command, *pending, *arguments, "--seconds", f"{left:.1f}", "--out", str(lines)],
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},  # last words of one that dies
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        reader = _Reader(lines, pending, report, measured)
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                reader.read()
                now = time.monotonic()
                if now - reader.last > stall_seconds or now > deadline + 30:
                    break
            hung = process.poll() is None
        finally:
            stop(process)
        reader.read()
        if reader.started is not None:
            tail = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            reason = f"the worker ended with status {process.returncode}: {tail[0][:200]}"
            if hung:
                reason = OUT_OF_TIME if time.monotonic() > deadline else "it did not return"
            reader.give_up(reader.started, reason)


class _Reader:
    """Follows the worker's lines."""

    def __init__(
        self,
        path: Path,
        pending: list[str],
        report: Callable[[dict[str, Any]], None],
        measured: Measured,
    ) -> None:
        self.path, self.pending, self.report, self.measured = path, pending, report, measured
        self.position = 0
        self.started: str | None = None
        self.last = time.monotonic()

    def read(self) -> None:
        """Take every line that has been written whole."""
        if not self.path.exists():
            return
        with open(self.path) as stream:
            stream.seek(self.position)
            text = stream.read()
        whole = text[: text.rfind("\n") + 1]
        self.position += len(whole.encode())
        for line in whole.splitlines():
            self.last = time.monotonic()
            self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        if "rates" in line:
            self.measured.rates = line["rates"]
        elif "started" in line:
            self.started = line["started"]
        elif "result" in line:
            result = line["result"]
            self._done(result["name"])
            self.measured.results.append(result)
            self.report(result)
        elif "failed" in line:
            self.give_up(line["failed"], line["reason"])

    def give_up(self, name: str, reason: str) -> None:
        """The entry has no result."""
        self._done(name)
        self.measured.not_measured.append({"name": name, "reason": reason})

    def _done(self, name: str) -> None:
        self.started = None
        self.pending.remove(name)
