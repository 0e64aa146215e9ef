"""Run a function in several processes of one gloo group: what the tests of ``distributed`` use.

A fork server has PyTorch and the project loaded, so that a group of four costs a second or two.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_PRELOADED = [
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "moe_kernels.distributed",
    "dit_models.train",
    # What a run loads when it starts: 1.1 instead of 2.7 CPU seconds a process.
    "sklearn.datasets",
    "torch.utils.tensorboard",
    "tqdm.auto",
]
# A collective that waits longer than this has lost its partner.
COLLECTIVE_TIMEOUT = timedelta(seconds=30)


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        value: what the function returned; ``None`` where it failed.
        error: the traceback of the exception that ended it; "" without one.
        exit_code: 0, or minus the signal that killed it.
    """

    value: Any = None
    error: str = ""
    exit_code: int | None = 0


def run_ranks(work: Callable[..., Any], count: int, *arguments: Any, timeout: float = 60) -> list:
    """Run ``work(*arguments)`` in ``count`` processes and return what each returned.

    Args:
        work: an importable function; inside, ``torch.distributed`` is initialised with gloo.
        count: processes.
        arguments: picklable, the same for all.
        timeout: seconds for all of it.

    Raises:
        AssertionError: one of them failed, with its traceback; or the time is over.
    """
    outcomes = run_outcomes(work, count, *arguments, timeout=timeout)
    failed = [
        f"rank {rank} ended with {outcome.exit_code}:\n{outcome.error}"
        for rank, outcome in enumerate(outcomes)
        if outcome.error or outcome.exit_code
    ]
    assert not failed, "\n".join(failed)
    return [outcome.value for outcome in outcomes]


def run_outcomes(
    work: Callable[..., Any], count: int, *arguments: Any, timeout: float = 60
) -> list[Outcome]:
    """As ``run_ranks``, for functions that are to fail: how each of the processes ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        address = (Path(folder) / "meeting").as_uri()
        processes: list[BaseProcess] = []
        pipes: list[Connection] = []
        try:
            for rank in range(count):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_worker, args=(theirs, address, rank, count, work, arguments)
                )
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            return _collect(processes, pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()


def _collect(
    processes: list[BaseProcess], pipes: list[Connection], deadline: float
) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    while len(outcomes) < len(processes):
        waiting = {pipes[rank]: rank for rank in range(len(pipes)) if rank not in outcomes}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(waiting.values())} did not end in time"
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                value, error = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:  # killed
                value, error = None, ""
            processes[rank].join(max(1.0, deadline - time.monotonic()))
            outcomes[rank] = Outcome(value, error, processes[rank].exitcode)
    return [outcomes[rank] for rank in range(len(processes))]


def _worker(
    pipe: Connection, address: str, rank: int, size: int, work: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        GLOO_SOCKET_IFNAME="lo",
    )
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    torch.manual_seed(1234)
    value, error = None, ""
    try:
        distributed.init_process_group(
            "gloo",
            init_method=address,
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        # One that ended before all are connected would break the others' meeting.
        distributed.barrier()
        value = work(*arguments)
    except BaseException:
        error = traceback.format_exc()
    pipe.send_bytes(pickle.dumps((value, error)))
    pipe.close()
    # Without the clean end of the group, in which a failed rank would wait for the others.
    os._exit(0)
