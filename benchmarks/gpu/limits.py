"""What this device can do at best: a copy of the entry's size, a large matrix product."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.entry import Cost
from benchmarks.gpu.clock import Clock
from benchmarks.ratios import quantile
from benchmarks.stages.common import generator_on, normal

PRODUCT_SIZE = 8192
LARGE_COPY = 2**30
REPEATS = 9


class Limits:
    """Rates of a device, measured when first asked for and then kept.

    Args:
        clock: of the device.
        product_size: sides of the product.
        largest_copy: bytes; larger entries are compared with this copy.
    """

    def __init__(
        self, clock: Clock, product_size: int = PRODUCT_SIZE, largest_copy: int = LARGE_COPY
    ) -> None:
        self.clock, self.product_size, self.largest_copy = clock, product_size, largest_copy
        self._products: dict[torch.dtype, float] = {}
        self._copies: dict[int, float] = {}

    def product_flops(self, dtype: torch.dtype) -> float:
        """Floating-point operations per second of a square product of random numbers."""
        if dtype not in self._products:
            generator, size = generator_on(self.clock.device), self.product_size
            a, b = (normal(generator, size, size, dtype=dtype) for _ in range(2))
            self._products[dtype] = 2 * size**3 / self._seconds(lambda: a @ b)
        return self._products[dtype]

    def copy_bytes(self, size: int) -> float:
        """Bytes read and written per second by a copy of ``size`` bytes out of a cold cache."""
        if size not in self._copies:
            generator = generator_on(self.clock.device)
            source = normal(generator, size // 4)
            target = torch.empty_like(source)
            self._copies[size] = 2 * size / self._seconds(lambda: target.copy_(source))
        return self._copies[size]

    def seconds(self, cost: Cost, dtype: torch.dtype) -> float:
        """No less than this for a cost's arithmetic and its traffic."""
        arithmetic = cost.flops / self.product_flops(dtype)
        return max(arithmetic, self.traffic_seconds(cost))

    def traffic_seconds(self, cost: Cost) -> float:
        """Time of a copy that moves as many bytes, rounded up to a power of two."""
        size = max(2**16, 1 << max(int(cost.bytes) // 2 - 1, 1).bit_length())
        return cost.bytes / self.copy_bytes(min(size, self.largest_copy))

    def describe(self, dtype: torch.dtype) -> dict[str, Any]:
        """Both rates at their largest, for the header."""
        return {
            "copy_tb_s": self.copy_bytes(self.largest_copy) * 1e-12,
            "product_tflops": self.product_flops(dtype) * 1e-12,
        }

    def _seconds(self, function: Callable[[], object]) -> float:
        for _ in range(2):
            function()
        marks = []
        for _ in range(REPEATS):
            self.clock.flush()
            start = self.clock.mark()
            function()
            marks.append((start, self.clock.mark()))
        self.clock.wait()
        return quantile([self.clock.seconds(*pair) for pair in marks], 0.5)
