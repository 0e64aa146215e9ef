"""Process groups by name: a name fits into an op, a copy of a module and a pickle."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from moe_kernels.distributed.debug import check_collective

_groups: dict[str, distributed.ProcessGroup] = {}


def remember(process_group: distributed.ProcessGroup) -> str:
    """The name of a group, under which ``recall`` finds it in this process."""
    if not isinstance(process_group, distributed.ProcessGroup):
        raise ValueError(
            f"process_group is {process_group!r}; expected a torch.distributed.ProcessGroup "
            "(torch.distributed.group.WORLD is that of all processes)."
        )
    _groups[process_group.group_name] = process_group
    return process_group.group_name


def recall(name: str) -> distributed.ProcessGroup:
    """The group of that name.

    Raises:
        RuntimeError: this process has not been given it.
    """
    if name not in _groups:
        raise RuntimeError(
            f"the process group {name!r} of a shared pool is not one of this process; a copy of "
            "the model that came from another process has to share its pools again (share_pools)."
        )
    return _groups[name]


def all_reduce(name: str, values: Tensor, process_group: distributed.ProcessGroup) -> Tensor:
    """Sum ``values`` over the ranks, in place."""
    check_collective(name, process_group, values.dtype, values.numel())
    distributed.all_reduce(values, group=process_group)
    return values


def all_gather(name: str, values: Tensor, process_group: distributed.ProcessGroup) -> Tensor:
    """(ranks, *values.shape), in rank order; every rank gives the same shape."""
    check_collective(name, process_group, values.dtype, values.numel())
    ranks = distributed.get_world_size(process_group)
    gathered = values.new_empty(ranks, *values.shape)
    # The form with a list has the same name in all versions of PyTorch.
    distributed.all_gather(list(gathered.unbind(0)), values.contiguous(), group=process_group)
    return gathered


def sum_over_ranks(
    tensors: Sequence[Tensor], process_group: distributed.ProcessGroup
) -> list[Tensor]:
    """The sums of tensors over all ranks, in one all-reduce, without gradient.

    Args:
        tensors: of one dtype and device, of any shapes; the same shapes on every rank.
        process_group: the ranks.

    Returns:
        New tensors of the same shapes.

    Raises:
        ValueError: tensors of several dtypes.
    """
    if not tensors:
        return []
    if len({tensor.dtype for tensor in tensors}) > 1:
        given = ", ".join(str(tensor.dtype) for tensor in tensors)
        raise ValueError(f"tensors have the dtypes {given}; expected one dtype.")
    with torch.no_grad():
        joined = torch.cat([tensor.detach().flatten() for tensor in tensors])
        parts = all_reduce("sum over ranks", joined, process_group).split(
            [tensor.numel() for tensor in tensors]
        )
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
