"""What a call does besides taking time: it waits for the device, launches, keeps memory."""

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.check import first_line
from benchmarks.entry import Inputs, Run
from benchmarks.gradients import differentiable, upstream_of

TOP_KERNELS = 12


@contextmanager
def sync_debug(mode: str) -> Iterator[None]:
    """PyTorch's own check for operations that make the host wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # The first use says that the feature is a prototype.
        warnings.filterwarnings("ignore", message=".*[Ss]ynchronization debug mode.*")
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def host_syncs(call: Callable[[], object]) -> int:
    """How often a call that ran before makes the host wait."""
    with warnings.catch_warnings(record=True) as caught, sync_debug("warn"):
        warnings.simplefilter("always")
        call()
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def sync_error(call: Callable[[], object]) -> str:
    """The error of a call in a mode in which waiting is one; empty when there is none."""
    try:
        with sync_debug("error"):
            call()
    except RuntimeError as error:
        return first_line(error)
    return ""


def kernels_of(call: Callable[[], object]) -> dict[str, Any]:
    """What the device runs in a call, by the profiler.

    Returns:
        ``kernels`` and ``copies`` (with fills): how many; ``longest``: name, number and seconds of
        the kernels that take longest.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    numbers: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for event in profile.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device and not event.name.endswith((" Sync", "Synchronize", "Wait Event")):
            numbers[event.name] += 1
            seconds[event.name] += event.time_range.elapsed_us() * 1e-6
    if not numbers:
        raise RuntimeError("the profiler saw no kernels (CUPTI is missing or not permitted)")
    copies = sum(numbers[name] for name in numbers if name.startswith(("Memcpy", "Memset")))
    longest = [
        {"name": name[:120], "number": numbers[name], "seconds": spent}
        for name, spent in seconds.most_common(TOP_KERNELS)
    ]
    return {"kernels": sum(numbers.values()) - copies, "copies": copies, "longest": longest}


def memory_of(run: Run, inputs: Inputs) -> dict[str, int]:
    """Growth of allocated device memory by one forward and backward; the keys of the CPU's.

    Returns:
        ``peak_bytes`` at any time; ``saved_bytes`` between forward and backward, the output among
        them; ``gradient_bytes`` of the gradients, part of the peak.
    """
    count, leaves = differentiable(run, inputs), run.flat_leaves
    upstream = upstream_of(run, inputs, run.call()[:count])
    torch.autograd.grad(run.call()[:count], leaves, upstream)  # workspaces of libraries are made
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run.call()[:count]
    saved = torch.cuda.memory_allocated() - before
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    torch.cuda.synchronize()
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "saved_bytes": saved,
        "gradient_bytes": sum(gradient.nbytes for gradient in gradients),
    }
