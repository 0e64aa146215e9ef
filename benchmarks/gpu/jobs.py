"""Commands side by side, each with a limit on its time and its output in memory."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """A command to run.

    Attributes:
        name: for the report.
        command: program and arguments.
        environment: all of it; ``None`` is this process's.
        seconds: a limit of its own, from its start; ``None``: only that of all jobs.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its status (``None``: stopped at the limit), output and seconds."""

    status: int | None
    output: str
    seconds: float

    @property
    def last_line(self) -> str:
        """The last line that is not empty."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else ""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    file: IO[bytes]
    began: float = field(default_factory=time.monotonic)

    @property
    def is_late(self) -> bool:
        """Whether it has used up the time that it was given for itself."""
        limit = self.job.seconds
        return limit is not None and time.monotonic() - self.began > limit

    def outcome(self, status: int | None) -> Outcome:
        self.file.seek(0)
        text = self.file.read().decode(errors="replace")
        self.file.close()
        return Outcome(status, text, time.monotonic() - self.began)


def run_jobs(
    jobs: Sequence[Job], *, at_once: int, seconds: float, folder: Path | None = None
) -> dict[str, Outcome]:
    """Run every job, ``at_once`` of them side by side.

    What still runs after ``seconds`` is stopped; a job that has not started by then has no outcome.
    """
    deadline = time.monotonic() + seconds
    waiting, running = list(jobs), dict[str, _Running]()
    outcomes: dict[str, Outcome] = {}
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[job.name] = _start(job, folder)
            for name, current in list(running.items()):
                status = current.process.poll()
                late = status is None and current.is_late
                if late:
                    _stop_group(current.process)
                if status is not None or late:
                    outcomes[name] = running.pop(name).outcome(status)
            time.sleep(POLL_SECONDS)
    finally:
        for name, current in running.items():
            _stop_group(current.process)
            outcomes[name] = current.outcome(None)
    return outcomes


def _start(job: Job, folder: Path | None) -> _Running:
    file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the outcome)
    environment: Any = None if job.environment is None else dict(job.environment)
    process = subprocess.Popen(
        list(job.command),
        cwd=folder,
        env=environment,
        stdout=file,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    return _Running(job, process, file)


def _stop_group(process: "subprocess.Popen[bytes]") -> None:
    """End a job with the processes that it started: they might go on without it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process, by force after a few seconds."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
