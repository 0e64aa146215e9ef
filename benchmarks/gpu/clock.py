"""How device work is timed: marks on the device's stream, and a cold second-level cache.

``HostClock`` does the same with the processor's clock, so that everything above it runs, and is
tested, without a GPU.
"""

import time
from typing import Any, Protocol

import torch

MIN_FLUSH_BYTES = 256 * 2**20


class Clock(Protocol):
    """Marks in the order of the device's work."""

    device: torch.device

    def flush(self) -> None:
        """Throw everything else out of the cache; takes its time on the device."""

    def mark(self) -> Any:
        """A point between the work enqueued before and after."""

    def seconds(self, start: Any, end: Any) -> float:
        """Device time between two marks, after ``wait``."""

    def wait(self) -> None:
        """Until the device has done everything."""


class CudaClock:
    """Events of the current stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
        # Twice the cache, and enough to keep the device busy while the host enqueues the next call.
        size = max(MIN_FLUSH_BYTES, 2 * cache)
        self._buffer = torch.empty(size // 4, dtype=torch.int32, device=device)
        self.flush_bytes = size

    def flush(self) -> None:
        self._buffer.zero_()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) * 1e-3

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


class HostClock:
    """The processor's clock; its caches are left as they are."""

    flush_bytes = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def flush(self) -> None:
        """Nothing to do."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def wait(self) -> None:
        """Everything is done when a call returns."""


def clock_of(device: torch.device) -> CudaClock | HostClock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock(device)
