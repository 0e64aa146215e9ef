"""The autocast rule of the products."""

import torch
from torch import Tensor


def autocast_operands(*operands: Tensor) -> tuple[Tensor, ...]:
    """Cast floating-point operands to the autocast dtype of their device when autocast is on."""
    device_type = operands[0].device.type
    if not torch.is_autocast_enabled(device_type) or operands[0].dtype == torch.float64:
        return operands
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(operand.to(dtype) for operand in operands)
