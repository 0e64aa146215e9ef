"""A watchdog for each rank: a job that stands still ends with the name of who holds it up."""

import faulthandler
import os
import re
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

import moe_kernels
from dit_models.parallel.diagnosis import (
    HANG_STATUS,
    RankLost,
    diagnose,
    explain_failure,
    is_lost_peer,
)
from dit_models.parallel.heartbeats import (
    ENDED,
    FAILED,
    FOLDER_NAME,
    RUNNING,
    Heartbeat,
    describe_error,
    read_heartbeats,
    write_heartbeat,
)

__all__ = ["HANG_STATUS", "RankLost", "Watchdog", "explain_failure", "is_lost_peer"]

FIRST_TIME_FACTOR = 10
_SHORTEST_INTERVAL = 1.0
_WRITES_A_SECOND = 50  # of all ranks: what a shared file system does not notice
_LONGEST_GOODBYE = 2.0
_NUMBER = re.compile(r"\d+")
# Code that waits for other ranks lies in one of these; all else is a rank's own work.
_WAITING_CODE = (
    os.path.dirname(torch.__file__),
    os.path.join(os.path.dirname(moe_kernels.__file__), "distributed"),
    os.path.dirname(__file__),
)
_LIBRARY = sysconfig.get_path("stdlib")


class _Place(NamedTuple):
    """What a rank does now: its report, that without numbers, since when and for how long."""

    where: str
    kind: str
    since: float
    limit: float


class Watchdog:
    """Context in which a rank that stands still for too long ends its process.

    A thread writes the rank's heartbeat file every second, every ``size / 50`` seconds in large
    groups, and ten times a ``timeout`` at least. When the rank has reported nothing for ``timeout``
    seconds, and no rank has a reason to take long, the thread prints which rank holds up the
    others, and where, and ends the process with ``HANG_STATUS``, whereupon torchrun restarts the
    group. A place that a rank reaches for the first time may take ``FIRST_TIME_FACTOR`` times as
    long (compilation, the first reading of the data); numbers in its name do not count.

    An exception of a collective that lost its partner leaves the context as ``RankLost``, with the
    name of the rank. A process that torchrun started and whose torchrun has died gets SIGTERM, so
    that it saves and stops instead of training on unwatched.

    Args:
        folder: the run's folder, in a file system that all ranks share.
        rank: number of this process.
        size: number of processes.
        timeout: seconds; 0 watches nothing.

    Raises:
        ValueError: a negative ``timeout``.
    """

    def __init__(self, folder: Path, rank: int, size: int, timeout: float) -> None:
        if timeout < 0:
            raise ValueError(f"timeout={timeout}; expected seconds above 0, or 0 to watch nothing.")
        self.folder, self.rank, self.size, self.timeout = folder, rank, size, timeout
        self._interval = min(timeout / 10, max(_SHORTEST_INTERVAL, size / _WRITES_A_SECOND))
        self._at = self._start()
        self._reached: set[str] = set()
        self._pauses = 0
        self._awake_since = 0.0
        self._main_thread = 0
        self._parent = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if not self.timeout:
            return self
        (self.folder / FOLDER_NAME).mkdir(parents=True, exist_ok=True)
        self._main_thread = threading.get_ident()
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
        self._at = self._start()
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        self._end.set()
        self._thread.join()
        if error is None:
            self._beat(ENDED)
            return
        lost = is_lost_peer(error)
        # Who leaves by SystemExit was told to by another rank, which says why.
        self._beat(FAILED, describe_error(error), lost or isinstance(error, SystemExit))
        if self.size > 1:
            # A background thread that waits for a lost rank would keep the process from ending.
            threading.Thread(target=self._see_it_end, args=(error,), daemon=True).start()
        if lost:
            raise RankLost(explain_failure(error, self.folder, self.rank, self.size)) from error

    def report(self, where: str) -> None:
        """Say what this rank does next, such as ``step 14: backward``; takes a microsecond."""
        self._reached.add(self._at.kind)
        kind = _NUMBER.sub("", where)
        limit = self.timeout if kind in self._reached else self.timeout * FIRST_TIME_FACTOR
        self._at = _Place(where, kind, time.monotonic(), limit)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context for what may take any time, such as an evaluation; the others wait for it."""
        self._pauses += 1
        try:
            yield
        finally:
            self._at = self._at._replace(since=time.monotonic())
            self._pauses -= 1

    def _start(self) -> "_Place":
        return _Place("starting", "starting", time.monotonic(), self.timeout * FIRST_TIME_FACTOR)

    def _stood(self, place: "_Place") -> float:
        return time.monotonic() - max(place.since, self._awake_since)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._end.wait(self._interval):
            now = time.monotonic()
            if now - before > self.timeout / 2:
                # The whole process stood still (a suspended job): nobody was late meanwhile.
                self._awake_since = now
            before = now
            self._beat()
            self._look_for_parent()
            place = self._at
            if not self._pauses and self._stood(place) >= place.limit:
                self._judge()

    def _beat(self, state: str = RUNNING, error: str = "", lost_peer: bool = False) -> None:
        place = self._at
        stood = self._stood(place)
        line, outside = "", False
        if stood > self._interval:
            line, outside = _innermost_line(self._main_thread)
        beat = Heartbeat(
            self.rank, socket.gethostname(), os.getpid(), place.where, stood,
            None if self._pauses else place.limit, self._interval, line, outside,
            state, error, lost_peer,
        )  # fmt: skip
        write_heartbeat(self.folder, beat)

    def _look_for_parent(self) -> None:
        if self._parent and os.getppid() != self._parent:
            _print(f"rank {self.rank}: torchrun (process {self._parent}) is gone; stopping.")
            self._parent = 0
            os.kill(os.getpid(), signal.SIGTERM)

    def _judge(self) -> None:
        seen = read_heartbeats(self.folder, self.rank, self.size)
        diagnosis = diagnose(seen, self.rank, self.timeout / 2)
        if diagnosis is None:
            return
        _print(diagnosis.text if diagnosis.reporter else diagnosis.short)
        # The stack of one that waits says no more than its place.
        if self.rank in diagnosis.suspects or (diagnosis.reporter and not diagnosis.suspects):
            _print(f"rank {self.rank}: Python stack of its threads:")
            faulthandler.dump_traceback(file=2, all_threads=True)
        # The first process that ends makes torchrun end the others; each is to have its say.
        time.sleep(min(2 * self._interval, _LONGEST_GOODBYE))
        os._exit(HANG_STATUS)

    def _see_it_end(self, error: BaseException) -> None:
        time.sleep(self.timeout)
        _print(
            f"rank {self.rank} did not end by itself within {self.timeout:.0f} s after "
            f"{describe_error(error)}; ended with status {HANG_STATUS}."
        )
        os._exit(HANG_STATUS)


def _innermost_line(thread: int) -> tuple[str, bool]:
    """Where a thread is, without Python's own library, and whether it cannot wait for ranks."""
    frame = sys._current_frames().get(thread)
    while frame is not None and _is_library(frame.f_code.co_filename) and frame.f_back is not None:
        frame = frame.f_back
    if frame is None:
        return "", False
    code = frame.f_code
    outside = not code.co_filename.startswith(_WAITING_CODE)
    return f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}", outside


def _is_library(file: str) -> bool:
    return file.startswith((_LIBRARY, "<frozen")) and "-packages" not in file


def _print(text: str) -> None:
    """One write, so that lines of several processes do not mix; not into a progress bar."""
    os.write(2, f"\nwatchdog: {text}\n".encode())
