"""Time of a call inside a CUDA graph: what the device needs when no launch waits for the host.

``CALLS`` calls over the rotating inputs are recorded into one graph and replayed; the column is the
replay's time over ``CALLS``. The cache is as warm as the calls leave it.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.ratios import Summary, summarize

CALLS = 20
REPLAYS = 15


def graph_time(
    calls: Sequence[Callable[[], object]], clock: Clock, replays: int = REPLAYS
) -> Summary:
    """Seconds per call, over the replays.

    Args:
        calls: one for each set of inputs; they must not wait for the device.
        clock: of the device.
        replays: of the whole graph.

    Raises:
        RuntimeError: when a call cannot be recorded, or the device has no graphs.
    """
    replay = _recorded([calls[number % len(calls)] for number in range(CALLS)], clock.device)
    for _ in range(3):
        replay()
    marks = []
    for _ in range(replays):
        start = clock.mark()
        replay()
        marks.append((start, clock.mark()))
    clock.wait()
    return summarize([clock.seconds(start, end) / CALLS for start, end in marks])


def _recorded(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], None]:
    if device.type != "cuda":
        raise RuntimeError("needs a CUDA device")
    # What allocates or compiles at a first call has to do it before, on a stream of its own.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with _no_collection(), torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collected Triton kernel unloads its module, which ends a recording."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
