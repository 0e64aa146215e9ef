"""Rows on their way between ranks: an all-to-all with autograd, in two halves.

``Travel`` starts it, ``Travel.wait`` ends it, so that other work fits between; the backward of
``wait`` starts the way back and that of the start waits for it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from moe_kernels.distributed.debug import check_collective


@dataclass(frozen=True, eq=False)
class Splits:
    """How many rows go to each rank of a group, and come from each.

    Attributes:
        group: the process group.
        sends: rows to each of its ranks; they lie in the order of the ranks.
        receives: rows from each.
        are_equal: all of these numbers are the same on all ranks, known without asking anybody.
    """

    group: distributed.ProcessGroup
    sends: list[int]
    receives: list[int]
    are_equal: bool = False

    def reverse(self) -> "Splits":
        """The way back."""
        return Splits(self.group, self.receives, self.sends, self.are_equal)


@dataclass(eq=False)
class _Flight:
    """One started all-to-all; holds its tensors until it has ended."""

    work: distributed.Work
    rows: Tensor
    arriving: Tensor

    @classmethod
    def start(cls, rows: Tensor, splits: Splits, name: str) -> "_Flight":
        rows = rows.contiguous()
        sends, receives = splits.sends, splits.receives
        check_collective(name, splits.group, rows.dtype, rows.shape[1], sends, receives)
        arriving = rows.new_empty(sum(receives), rows.shape[1])
        work = distributed.all_to_all_single(
            arriving,
            rows,
            None if splits.are_equal else receives,
            None if splits.are_equal else sends,
            group=splits.group,
            async_op=True,
        )
        return cls(work, rows, arriving)


@dataclass(eq=False)
class _Ticket:
    """What the two halves of a journey share: its sizes and what is in flight."""

    splits: Splits
    name: str
    there: _Flight | None = None
    back: _Flight | None = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ticket: _Ticket) -> Tensor:
        ctx.ticket = ticket
        ticket.there = _Flight.start(rows, ticket.splits, ticket.name)
        # What stands for the rows until they are waited for has the shape of what comes back.
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None]:
        flight, ctx.ticket.back = ctx.ticket.back, None
        flight.work.wait()
        return drows, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, departed: Tensor, ticket: _Ticket) -> Tensor:
        ctx.ticket = ticket
        flight, ticket.there = ticket.there, None
        assert flight is not None, "these rows have been waited for"
        flight.work.wait()
        return flight.arriving

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, darrived: Tensor) -> tuple[Tensor, None]:
        ticket: _Ticket = ctx.ticket
        # The gradient that is returned has not arrived; only ``_Start.backward`` reads it, and
        # the anomaly mode, which looks for NaN in it.
        ticket.back = _Flight.start(
            darrived, ticket.splits.reverse(), f"gradients of {ticket.name}"
        )
        if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
            ticket.back.work.wait()
        return ticket.back.arriving, None


class Travel:
    """Rows that are being sent to other ranks.

    Args:
        rows: (R, D), first those for rank 0 of the group, then those for rank 1, and so on;
            R is the sum of ``splits.sends``.
        splits: how many.
        name: for ``check_collective``.
    """

    def __init__(self, rows: Tensor, splits: Splits, name: str) -> None:
        self._ticket = _Ticket(splits, name)
        self._departed: Tensor | None = _Start.apply(rows, self._ticket)

    def wait(self) -> Tensor:
        """(sum of ``splits.receives``, D): rows from rank 0 of the group, then from rank 1, ..."""
        # Lets go of what was sent.
        departed, self._departed = self._departed, None
        arrived: Tensor = _Finish.apply(departed, self._ticket)
        return arrived


class Counts:
    """The numbers of rows that ranks are about to send, on their way to each other.

    Args:
        counts: (E,) int32, rows for each expert, in the order of their owners.
        group: process group of W ranks; each owns E / W experts.

    Attributes:
        received: (W, E / W) int32, rows from each rank for each expert of this rank; to be read
            after ``splits``.
    """

    def __init__(self, counts: Tensor, group: distributed.ProcessGroup) -> None:
        check_collective("row counts", group, counts.dtype, counts.shape[0])
        self._group = group
        self._counts = counts.contiguous()
        received = torch.empty_like(self._counts)
        self._work = distributed.all_to_all_single(
            received, self._counts, group=group, async_op=True
        )
        self.received = received.view(distributed.get_world_size(group), -1)

    def splits(self) -> Splits:
        """Rows to and from each rank, on the host: the one wait of a ragged exchange."""
        self._work.wait()
        sent = self._counts.view_as(self.received)
        sends, receives = torch.stack([sent.sum(1), self.received.sum(1)]).tolist()
        return Splits(self._group, sends, receives)
