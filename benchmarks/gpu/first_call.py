"""Seconds of a first call in a new process: ``python -m benchmarks.gpu.first_call ENTRY``.

With ``--warm`` also the peers under ``torch.compile`` run once, so that a later process finds their
code, and ours, in the caches on disk.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.entry import Entry
from benchmarks.gpu.clock import clock_of
from benchmarks.gradients import step
from benchmarks.registry import find_entry
from benchmarks.stages import STAGES


def measure(
    entry: Entry, provider: str, device: torch.device, now: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """``first_s`` and ``second_s`` of a forward and backward, imports and inputs left out."""
    stage, clock = STAGES[entry.stage], clock_of(device)
    inputs = stage.make_inputs(entry.shape, entry.torch_dtype, device)
    run = stage.providers[provider].build(inputs)
    clock.wait()
    seconds = []
    for _ in range(2):
        began = now()
        step(run, inputs)
        clock.wait()
        seconds.append(now() - began)
    return {"first_s": seconds[0], "second_s": seconds[1]}


def main(arguments: list[str] | None = None) -> int:
    """Print one measurement as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.first_call")
    parser.add_argument("entry")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="at the entry's tiny shape")
    parser.add_argument("--warm", action="store_true", help="run compiled peers, too")
    options = parser.parse_args(arguments)
    entry = find_entry(options.entry)
    entry = replace(entry, shape=entry.tiny) if options.tiny else entry
    device = torch.device(options.device)
    found = measure(entry, "ours", device)
    if options.warm:
        providers = STAGES[entry.stage].providers
        for name in entry.providers:
            if providers[name].compiled:
                measure(entry, name, device)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
