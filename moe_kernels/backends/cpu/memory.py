"""Large results in memory that is kept from call to call (``csrc/memory.cpp`` says why)."""

import os
from math import prod

import torch

from moe_kernels.backends.cpu.native import native

# Smaller tensors are quick to get from PyTorch.
LARGE_BYTES = 1 << 20


def _limit() -> int:
    text = os.environ.get("MOE_KERNELS_KEEP_MB") or "1024"
    if not text.isdigit():
        raise ValueError(f"MOE_KERNELS_KEEP_MB is {text!r}; expected a number of megabytes.")
    return int(text) << 20


native.keep_at_most(_limit())


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised contiguous tensor on the CPU."""
    count = prod(shape)
    if count * dtype.itemsize < LARGE_BYTES:
        return torch.empty(shape, dtype=dtype)
    memory = native.Memory(count * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
