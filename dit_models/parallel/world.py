"""The processes of a run: who they are, what they divide, and how they agree."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed

from dit_models.assemble import pick_device
from dit_models.config import ParallelConfig
from dit_models.parallel.launch import check_launch, world_size

if TYPE_CHECKING:  # one process does not need it, and it takes a second to load
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train one model together; by default one.

    Attributes:
        device: of this process.
        rank: number of this process.
        size: number of processes, W.
        dense: mesh (replicate, shard) for what every process has a part of.
        experts: mesh (replicate, shard, expert) over the same processes, for the experts.
        host_group: their gloo group for small values on the host; ``None`` for one process.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    dense: "DeviceMesh | None" = None
    experts: "DeviceMesh | None" = None
    host_group: distributed.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def describe(self) -> str:
        """One line for the user: how many processes, and how they divide the model."""
        if self.experts is None:
            return "1 process"
        copies, _, owners = self.experts.mesh.shape
        parts = f"{self.size} processes: {copies} cop{'y' if copies == 1 else 'ies'} of the model"
        return f"{parts}, each divided among {self.size // copies}, experts among {owners}."

    def part_of(self, count: int) -> slice:
        """Which of ``count`` images of a batch are this process's."""
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """The group of all processes, on the device; ``None`` for one process."""
        return distributed.group.WORLD if self.size > 1 else None

    def sum_(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(value)
        return value

    def mean_(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes, in place."""
        return self.sum_(value).div_(self.size)

    def largest(self, number: int) -> int:
        """The largest ``number`` of all processes."""
        if self.size == 1:
            return number
        value = torch.tensor([number])
        distributed.all_reduce(value, distributed.ReduceOp.MAX, group=self.host_group)
        return int(value.item())

    def lead(self, work: Callable[[], T]) -> T:
        """Process 0 works and the others get what it returns.

        Raises:
            SystemExit: in the others, where process 0 failed: it says why.
        """
        if self.size == 1:
            return work()
        outcome: list[tuple[bool, T | None]] = [(False, None)]
        try:
            if self.is_main:
                outcome = [(True, work())]
        finally:
            distributed.broadcast_object_list(outcome, 0, group=self.host_group)
        done, value = outcome[0]
        if not done:
            raise SystemExit(1)
        return value  # type: ignore[return-value]


@contextmanager
def join_world(
    config: ParallelConfig, device: str, settings: Mapping[str, Any] | None = None
) -> Iterator[World]:
    """The processes that torchrun has started, or this one alone.

    Args:
        config: how they divide the work.
        device: as ``TrainConfig.device``; with several GPUs each process takes one of its own.
        settings: plain values that must be the same in all of them.

    Raises:
        ValueError: a division that does not come out even, not as many processes as asked for, or
            settings that differ.
    """
    size = world_size(os.environ)
    check_division(config, size)
    if size == 1:
        yield World(pick_device(device))
        return
    own_device = _device_of(device)
    ours = not distributed.is_initialized()
    if ours:
        if own_device.type == "cuda":
            torch.cuda.set_device(own_device)
        backend = "cpu:gloo,cuda:nccl" if own_device.type == "cuda" else "gloo"
        for warning in check_launch(os.environ, backend):
            if os.environ["RANK"] == "0":
                print(f"warning: {warning}", file=sys.stderr)
        distributed.init_process_group(backend, timeout=_patience(config))
    try:
        _require_alike(settings or {})
        yield _divided(config, own_device)
    finally:
        if ours:
            distributed.destroy_process_group()


def _require_alike(settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` in all processes unless all were started with the same settings."""
    all_settings: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(all_settings, settings)
    first = all_settings[0]
    for rank, theirs in enumerate(all_settings):
        different = [name for name in first if theirs.get(name) != first[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"rank {rank} was started with {name}={theirs.get(name)!r}, rank 0 with "
                f"{first[name]!r}; start all processes with the same settings."
            )


def _divided(config: ParallelConfig, device: torch.device) -> World:
    from torch.distributed.device_mesh import init_device_mesh

    size = distributed.get_world_size()
    sharded = size // config.replicate
    dense = init_device_mesh(
        device.type, (config.replicate, sharded), mesh_dim_names=("replicate", "shard")
    )
    experts = init_device_mesh(
        device.type,
        (config.replicate, sharded // config.expert, config.expert),
        mesh_dim_names=("replicate", "shard", "expert"),
    )
    host_group = distributed.new_group(backend="gloo", timeout=_patience(config))
    return World(device, distributed.get_rank(), size, dense, experts, host_group)


def _patience(config: ParallelConfig) -> timedelta:
    """How long a collective waits: longer than the watchdog, which says more about the reason."""
    return timedelta(seconds=20 * config.timeout or 30 * 24 * 3600)


def _device_of(name: str) -> torch.device:
    device = pick_device(name)
    if device.type == "cuda" and device.index is None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU: there are "
                f"{torch.cuda.device_count()}. Start as many processes as GPUs "
                "(torchrun --nproc-per-node)."
            )
        return torch.device("cuda", local)
    return device


def check_division(config: ParallelConfig, size: int) -> None:
    """Raise ``ValueError`` unless ``size`` processes can be divided as ``config`` says."""
    if config.data not in (0, size):
        start = f"torchrun --nproc-per-node {config.data} -m dit_models.train ..."
        raise ValueError(
            f"parallel.data={config.data}, and {size} process{'es' * (size > 1)} started. Start "
            f"{config.data} ({start}), or leave parallel.data out."
        )
    parts = config.expert * config.replicate
    if size == 1 < parts:
        raise ValueError(
            f"parallel.expert={config.expert} times parallel.replicate={config.replicate}, and 1 "
            "process started. Start a multiple of that (torchrun --nproc-per-node ...)."
        )
    if size % parts:
        raise ValueError(
            f"parallel.expert={config.expert} times parallel.replicate={config.replicate} does "
            f"not divide the {size} processes; choose divisors of {size}."
        )
