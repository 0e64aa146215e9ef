"""A check before each collective that all ranks are about to run the same one, with fitting sizes.

``torch.distributed`` notices neither collectives in another order nor receive sizes, widths or
dtypes other than those sent: they give garbage, or a process that dies without a word.
"""

import os
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, distributed

VARIABLE = "MOE_KERNELS_DISTRIBUTED_DEBUG"
# Bytes of an operation's name that travel; a multiple of 8.
_NAME_BYTES = 64
# What stands before the name and the sizes: sequence, dtype, width, whether there are sizes.
_NUMBERS = 4
_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


class DistributedMismatch(RuntimeError):
    """Ranks were about to run collectives that do not fit together; raised on all of them."""


class _Debug:
    """Whether this process checks."""

    on = os.environ.get(VARIABLE, "0") not in ("", "0")


# How many collectives of each group this process has checked, by the group's name.
_checked: dict[str, int] = {}


class debug_collectives:
    """Check every collective of ``moe_kernels.distributed``, for good or in a ``with`` block.

    All ranks must turn the check on and off at the same place. ``MOE_KERNELS_DISTRIBUTED_DEBUG=1``
    turns it on from the start. It costs an all-gather and a wait for the device before each
    collective, so it is for finding faults only.

    Args:
        enabled: whether to check.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._previous = _Debug.on
        _Debug.on = enabled

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _Debug.on = self._previous


def is_debugging() -> bool:
    """Whether ``check_collective`` checks."""
    return _Debug.on


def check_collective(
    name: str,
    group: distributed.ProcessGroup | None,
    dtype: torch.dtype,
    width: int,
    sends: Sequence[int] | None = None,
    receives: Sequence[int] | None = None,
) -> None:
    """Compare with all ranks what each is about to run; nothing happens unless debugging is on.

    Call it right before the collective, on every rank of the group.

    Args:
        name: what the collective is for, of at most 64 bytes: ``"dispatch rows"``.
        group: process group of the collective; ``None`` is the default group.
        dtype: of what is sent.
        width: elements of what is sent; of one row where ``sends`` says how many rows.
        sends: rows to each rank of the group, for an all-to-all.
        receives: rows expected from each rank, for an all-to-all.

    Raises:
        DistributedMismatch: on every rank, names the ranks and what differs.
    """
    if not _Debug.on:
        return
    group = group or distributed.group.WORLD
    assert group is not None, "torch.distributed is not initialised"
    size = distributed.get_world_size(group)
    sequence = _checked.get(group.group_name, 0)
    _checked[group.group_name] = sequence + 1
    header = _pack(sequence, name, dtype, width, sends, receives, size).to(_device_of(group))
    gathered = [torch.empty_like(header) for _ in range(size)]
    distributed.all_gather(gathered, header, group=group)
    lines = [_Header(row, size) for row in torch.stack(gathered).tolist()]
    ranks = distributed.get_process_group_ranks(group)
    problems = _compare(lines, ranks)
    if problems:
        said = "; ".join(f"rank {rank}: {line}" for rank, line in zip(ranks, lines, strict=True))
        raise DistributedMismatch(
            f"the ranks of group {ranks} are about to run collectives that differ in "
            f"{', '.join(problems)}. {said}. Every rank must run the same layers in the same "
            "order, with the same dtypes and widths."
        )


class _Header:
    """What one rank is about to run."""

    def __init__(self, numbers: list[int], size: int) -> None:
        self.sequence, dtype, self.width, self.has_sizes = numbers[:_NUMBERS]
        self.dtype = _DTYPES[dtype] if dtype >= 0 else "another dtype"
        words = numbers[_NUMBERS : _NUMBERS + _NAME_BYTES // 8]
        text = b"".join(word.to_bytes(8, "little", signed=True) for word in words)
        self.name = text.rstrip(b"\0").decode("utf-8", "replace")
        sizes = numbers[_NUMBERS + _NAME_BYTES // 8 :]
        self.sends, self.receives = sizes[:size], sizes[size:]

    def __str__(self) -> str:
        text = f"{self.name!r} (number {self.sequence}) of {self.dtype}, width {self.width}"
        if self.has_sizes:
            text += f", sends {self.sends}, expects {self.receives}"
        return text


def _pack(
    sequence: int,
    name: str,
    dtype: torch.dtype,
    width: int,
    sends: Sequence[int] | None,
    receives: Sequence[int] | None,
    size: int,
) -> Tensor:
    """All of it as int64, equally many for every collective of a group of this size."""
    text = name.encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
    words = [
        int.from_bytes(text[at : at + 8], "little", signed=True) for at in range(0, _NAME_BYTES, 8)
    ]
    nothing = [0] * size
    dtype_number = _DTYPES.index(dtype) if dtype in _DTYPES else -1
    has_sizes = sends is not None and receives is not None
    return torch.tensor(
        [
            *(sequence, dtype_number, width, int(has_sizes)),
            *words,
            *(sends if sends is not None else nothing),
            *(receives if receives is not None else nothing),
        ],
        dtype=torch.int64,
    )


def _compare(lines: list[_Header], ranks: list[int]) -> list[str]:
    """What differs between the ranks."""
    problems = [
        words
        for field, words in (
            ("name", "order"),
            ("sequence", "number"),
            ("dtype", "dtype"),
            ("width", "width"),
            ("has_sizes", "kind"),
        )
        if len({str(getattr(line, field)) for line in lines}) > 1
    ]
    if not problems and lines[0].has_sizes:
        places = range(len(lines))
        wrong = [
            f"rank {ranks[i]} sends {lines[i].sends[j]} rows to rank {ranks[j]}, "
            f"which expects {lines[j].receives[i]}"
            for i in places
            for j in places
            if lines[i].sends[j] != lines[j].receives[i]
        ]
        if wrong:
            problems.append("sizes (" + "; ".join(wrong) + ")")
    return problems


def _device_of(group: distributed.ProcessGroup) -> torch.device:
    """Where a tensor must be for the group to carry it: gloo takes the host's."""
    accelerator = torch.accelerator.current_accelerator()
    if "gloo" in distributed.get_backend_config(group) or accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
