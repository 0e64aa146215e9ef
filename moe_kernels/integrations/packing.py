"""Parameters of many experts, put next to each other in memory.

A parameter stays the object that it was (optimisers, hooks and state dicts hold on to it); only
its memory moves into a slice of one buffer, from which the kernels read all experts at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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
    first = parameters[0]
    buffer = torch.empty((len(parameters), *first.shape), dtype=first.dtype, device=first.device)
    with torch.no_grad():
        for parameter, slot in zip(parameters, buffer, strict=True):
            slot.copy_(parameter)
            parameter.data = slot
    return None


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
    return None
