"""What this machine can do at best: the rate of a large product, the rate of a copy."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.entry import Cost

LARGE_COPY = 2**28  # bytes


def _best_seconds(function: Callable[[], object]) -> float:
    function()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def product_flops(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square product that fills the caches."""
    size = 1024
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / _best_seconds(lambda: a @ b)


@functools.cache
def copy_bytes(size: int) -> float:
    """Bytes read and written per second by a copy of ``size`` bytes, a power of two."""
    source = torch.zeros(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source))


def limit_seconds(cost: Cost, dtype: torch.dtype) -> float:
    """No less than this for the cost's arithmetic and its traffic, each at the machine's best.

    The copy moves about as many bytes as the entry, so that what fits a cache is compared with
    what a cache delivers.
    """
    size = min(LARGE_COPY, max(2**16, 1 << (int(cost.bytes) // 2).bit_length()))
    rate = max(product_flops(torch.float32), product_flops(dtype))
    return max(cost.flops / rate, cost.bytes / copy_bytes(size) if cost.bytes else 0.0)


def rates() -> dict[str, Any]:
    """Measured rates of large products, by dtype, and of a copy that fits no cache."""
    dtypes = (torch.float32, torch.bfloat16)
    return {
        "product": {str(dtype).removeprefix("torch."): product_flops(dtype) for dtype in dtypes},
        "copy": copy_bytes(LARGE_COPY),
    }
