"""Parameters of many experts, put next to each other in memory.

A parameter stays the object that it was (optimisers, hooks and state dicts hold on to it); only
its memory moves into a slice of one buffer, from which the kernels read all experts at once.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from moe_kernels.ops.parts import are_adjacent


def pack(parameters: Sequence[nn.Parameter]) -> str | None:
    """Move parameters of one shape into one buffer, in this order.

    Returns:
        ``None`` when they are adjacent now, else why they were left where they are (they are then
        stacked at every call).
    """
    reason = _why_not(parameters)
    if reason is not None or are_adjacent(list(parameters)):
        return reason
    if any(_is_part(parameter.data) and not _is_ours(parameter) for parameter in parameters):
        # An optimiser that shards, or FSDP1, updates the weights there.
        return "weights lie in a larger buffer of somebody else"
    first = parameters[0]
    with torch.inference_mode(False), torch.no_grad():
        shape = (len(parameters), *first.shape)
        buffer = torch.empty(shape, dtype=first.dtype, device=first.device)
        _remember(buffer)
        for parameter, slot in zip(parameters, buffer, strict=True):
            slot.copy_(parameter)
            parameter.data = slot
    return None


def unpack(parameters: Iterable[nn.Parameter]) -> None:
    """Give each parameter that ``pack`` has moved memory of its own."""
    with torch.inference_mode(False), torch.no_grad():
        for parameter in parameters:
            if _is_part(parameter.data) and _is_ours(parameter):
                parameter.data = parameter.data.clone()


# Buffers that pack() made; weak references, which also keep an address from being used again.
_buffers: set[StorageWeakRef] = set()


def _remember(buffer: Tensor) -> None:
    _buffers.difference_update([known for known in _buffers if known.expired()])
    _buffers.add(StorageWeakRef(buffer.untyped_storage()))


def _is_ours(parameter: nn.Parameter) -> bool:
    return StorageWeakRef(parameter.untyped_storage()) in _buffers


def seen_alone(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that does not know what lies around it.

    Tools that write files take tensors of one storage for tied weights, and refuse them or write
    one of them only.
    """
    if not _is_part(tensor):
        return tensor
    with torch.cuda.device_of(tensor):  # DLPack exports from the current device only
        return torch.from_dlpack(tensor)


def _is_part(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.is_meta or tensor.requires_grad:
        return False
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() > tensor.nbytes


def _why_not(parameters: Sequence[Tensor]) -> str | None:
    first = parameters[0]
    for parameter in parameters:
        if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
            return f"a weight is a {type(parameter).__name__}"
        if parameter.shape != first.shape:
            return f"weights have shapes {tuple(first.shape)} and {tuple(parameter.shape)}"
        if (parameter.dtype, parameter.device) != (first.dtype, first.device):
            return "weights differ in dtype or device"
        if parameter.is_meta:
            return "weights are on the meta device"
        if parameter.is_inference():
            return "weights were made in inference mode"
        if parameter.device.type == "cpu" and parameter.is_shared():
            return "weights are shared with other processes"
    size = first.numel() * first.element_size()
    starts = sorted(parameter.data_ptr() for parameter in parameters)
    if any(after - before < size for before, after in pairwise(starts)):
        return "experts share a weight"
    return None
