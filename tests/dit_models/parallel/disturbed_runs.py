"""Whole trainings in several processes, one of which is disturbed at a chosen moment."""

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from dit_models.metrics import read_metrics
from dit_models.parallel.watchdog import Watchdog
from dit_models.train import train

from ...ranks import Outcome, run_outcomes
from ..training import tiny_config

SAVE_EVERY = 2
# It stops before the end, after which nothing more is drawn.
OVERRIDES = ("steps=9", "stop_at=6", f"save_every={SAVE_EVERY}")


def kill() -> None:
    """End this process at once, as running out of memory does."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Do nothing for longer than any test."""
    time.sleep(60)


def freeze() -> None:
    """Stop this process, and kill it later, so that the test can end."""
    own = os.getpid()
    time.sleep(1)  # long enough for a heartbeat that says where
    subprocess.Popen(["sh", "-c", f"kill -STOP {own}; sleep 7; kill -KILL {own}"])
    time.sleep(60)


def terminate() -> None:
    """As a scheduler that wants the machine back; then torchrun says it to its processes again."""
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    """As Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def kill_in_the_next_save() -> None:
    """End this process when it flushes what it has written of a checkpoint."""
    os.fsync = lambda descriptor: kill()  # type: ignore[assignment]


def fill_the_disk_for_the_next_save() -> None:
    """The next file that this process flushes does not fit."""
    flush = os.fsync

    def full(descriptor: int) -> None:
        os.fsync = flush
        raise OSError(errno.ENOSPC, "No space left on device")

    os.fsync = full  # type: ignore[assignment]


def _wait_for_save(run_dir: Path, step: int) -> None:
    """Until the background has finished what was to be saved before."""
    target = run_dir / "checkpoints" / f"step_{step:08d}"
    while not target.exists():
        time.sleep(0.02)


def disturb(run_dir: Path, step: int, ranks: tuple[int, ...], fault: Callable[[], None]) -> None:
    """Let the given ranks meet ``fault`` in the middle of ``step``, once all is saved before it."""
    report = Watchdog.report

    def report_and_fail(watchdog: Watchdog, where: str) -> None:
        report(watchdog, where)
        if watchdog.rank in ranks and where == f"step {step}: backward":
            _wait_for_save(run_dir, (step - 1) // SAVE_EVERY * SAVE_EVERY)
            fault()

    Watchdog.report = report_and_fail  # type: ignore[method-assign]


def disturbed_train(
    run_dir: Path, overrides: tuple[str, ...], step: int, ranks: tuple[int, ...],
    fault: Callable[[], None] | None,
) -> int:  # fmt: skip
    """Train in a process of ``run_ranks``; what it says goes to a file beside the run's folder."""
    file = run_dir.with_name(f"stderr_{os.environ['RANK']}")
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
    if fault is not None:
        disturb(run_dir, step, ranks, fault)
    return train(tiny_config(run_dir, *OVERRIDES, *overrides))


def run(
    run_dir: Path,
    count: int,
    fault: Callable[[], None] | None = None,
    step: int = 5,
    ranks: tuple[int, ...] = (1,),
    overrides: tuple[str, ...] = (),
) -> list[Outcome]:
    """How each of ``count`` processes ended."""
    arguments = (run_dir, overrides, step, ranks, fault)
    return run_outcomes(disturbed_train, count, *arguments, timeout=150)


def losses(run_dir: Path) -> list[float]:
    """The loss of every step."""
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def checkpoints(run_dir: Path) -> list[str]:
    """Names of all that lies beside the checkpoints."""
    return sorted(os.listdir(run_dir / "checkpoints"))
