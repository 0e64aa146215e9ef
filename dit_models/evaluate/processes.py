"""Several processes that share the drawing: those of torchrun, or started here."""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from dit_models.interrupt import StopRequest

# One process may be drawing long after another has finished its share.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Group:
    """The processes of one command. They only wait for each other; images go through files.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def lead(self, work: Callable[[], None]) -> None:
        """Process 0 works while the others wait; where it fails they end, and it reports why."""
        failed = torch.ones(1, dtype=torch.int32)
        try:
            if self.rank == 0:
                work()
                failed.zero_()
        finally:
            if self.size > 1:
                distributed.broadcast(failed, 0)
        if self.rank and failed.item():
            sys.exit(0)

    def largest(self, number: int) -> int:
        """The largest ``number`` of all processes, once each has given its own."""
        if self.size == 1:
            return number
        value = torch.tensor([number])
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return int(value.item())


@contextmanager
def joined_group() -> Iterator[Group]:
    """The group that torchrun's variables (``RANK``, ``WORLD_SIZE``) describe; else one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Group()
        return
    with _joined("env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) as group:
        yield group


@contextmanager
def _joined(address: str, rank: int, size: int) -> Iterator[Group]:
    distributed.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=size, timeout=_PATIENCE
    )
    try:
        yield Group(rank, size)
    finally:
        distributed.destroy_process_group()


def device_for(name: str, rank: int) -> str:
    """The device of a process: with several GPUs each process has one of its own."""
    local = int(os.environ.get("LOCAL_RANK", rank))
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{local % torch.cuda.device_count()}"
    return name


def run_in_processes(work: Callable[[Any, Group], int], options: Any, count: int) -> int:
    """Run ``work(options, group)`` in ``count`` new processes of this machine.

    The CPU threads are divided between them. Ctrl-C or SIGTERM here asks each to finish its piece
    and stop; a second one ends them at once, and so does the failure of one of them.

    Args:
        work: an importable function; returns its exit status.
        options: picklable.
        count: processes.

    Returns:
        The first exit status that is not 0, else 0.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // count)
    with tempfile.TemporaryDirectory() as folder:
        address = (Path(folder) / "meeting").as_uri()
        processes = [
            context.Process(target=_worker, args=(work, options, address, rank, count, threads))
            for rank in range(count)
        ]
        try:
            with StopRequest() as stop:
                for process in processes:
                    process.start()
                return _supervise(processes, stop)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()


def _supervise(processes: Sequence[BaseProcess], stop: StopRequest) -> int:
    told = False
    while running := [process for process in processes if process.is_alive()]:
        wait([process.sentinel for process in running], timeout=0.2)
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed and not told:
            if failed[0] < 0:  # else it has said why
                print(
                    f"error: signal {-failed[0]} ended one of the processes; the same command "
                    "draws what is missing.",
                    file=sys.stderr,
                )
            return _status(failed[0])
        if stop.signal_number is not None and not told:
            told = True
            for process in running:
                process.terminate()  # they finish their piece
    if stop.signal_number is not None:
        return 128 + stop.signal_number
    return next((_status(p.exitcode) for p in processes if p.exitcode), 0)


def _status(exit_code: int) -> int:
    return exit_code if exit_code > 0 else 128 - exit_code


def _worker(
    work: Callable[[Any, Group], int],
    options: Any,
    address: str,
    rank: int,
    size: int,
    threads: int,
) -> None:
    from dit_models.train import run_command

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes through the parent
    torch.set_num_threads(threads)

    def run() -> int:
        with _joined(address, rank, size) as group:
            return work(options, group)

    run_command(run)


def parent_is_gone() -> bool:
    """Whether the process that started this one has ended, however it ended."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()
