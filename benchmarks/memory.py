"""Peak memory of one forward and backward: ``python -m benchmarks.memory ENTRY PROVIDER``.

Growth of the process's resident memory, because workspaces of C++ code are invisible to PyTorch's
allocator. Weights, tokens and upstream gradients are there before; the gradients of the weights
are part of the growth, in every provider.
"""

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.entry import Entry
from benchmarks.environment import ROOT
from benchmarks.gradients import differentiable, step, upstream_of
from benchmarks.ratios import quantile
from benchmarks.registry import find_entry
from benchmarks.stages import STAGES

RUNS = 3
_M_MMAP_THRESHOLD = -3  # of malloc.h


def measure(entry: Entry, provider: str) -> dict[str, int]:
    """Growth in bytes by a first forward and backward, in this (fresh) process.

    Returns:
        ``peak_bytes`` at any time; ``saved_bytes`` between the two, which a deep network holds for
        every layer; ``gradient_bytes`` of the gradients, part of the peak.

    Raises:
        OSError: where /proc cannot say it.
    """
    return_freed_memory()
    stage = STAGES[entry.stage]
    # A tiny pass first: libraries, threads and code are loaded, workspaces of this size are not.
    tiny = stage.make_inputs(entry.tiny, entry.torch_dtype)
    step(stage.providers[provider].build(tiny), tiny)
    inputs = stage.make_inputs(entry.shape, entry.torch_dtype)
    run = stage.providers[provider].build(inputs)
    gc.collect()
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident_bytes("VmRSS")
    outputs = run.call()[: differentiable(run, inputs)]
    saved = resident_bytes("VmRSS") - before
    upstream = upstream_of(run, inputs, outputs)
    gradients = torch.autograd.grad(outputs, run.flat_leaves, upstream)
    return {
        "peak_bytes": resident_bytes("VmHWM") - before,
        "saved_bytes": saved,
        "gradient_bytes": sum(gradient.nbytes for gradient in gradients),
    }


def return_freed_memory() -> None:
    """Give every freed tensor back to the system, so that no reused page hides an allocation."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)
    except (OSError, AttributeError):  # another C library: the growth is then a lower bound
        return


def resident_bytes(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return 1024 * int(found.group(1))


def in_fresh_processes(entry: Entry, provider: str, threads: int) -> dict[str, Any]:
    """Median of ``RUNS`` processes, or ``{"reason": ...}``."""
    command = [sys.executable, "-m", "benchmarks.memory", entry.name, provider]
    found = []
    for _ in range(RUNS):
        result = subprocess.run(
            [*command, "--threads", str(threads)], cwd=ROOT, capture_output=True, text=True
        )
        if result.returncode:
            return {"reason": (result.stderr.strip().splitlines() or ["no output"])[-1][:200]}
        found.append(json.loads(result.stdout.splitlines()[-1]))
    return {key: int(quantile([run[key] for run in found], 0.5)) for key in found[0]}


def main(arguments: list[str] | None = None) -> int:
    """Print one measurement as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("entry", help="name of an entry, see python -m benchmarks.run --list")
    parser.add_argument("provider")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--tiny", action="store_true", help="at the entry's tiny shape")
    options = parser.parse_args(arguments)
    try:
        entry = find_entry(options.entry)
        if options.provider not in entry.providers:
            known = ", ".join(entry.providers)
            raise ValueError(f"provider is {options.provider!r}; {entry.name} has {known}.")
    except ValueError as error:
        parser.error(str(error))
    if options.threads:
        torch.set_num_threads(options.threads)
    entry = replace(entry, shape=entry.tiny) if options.tiny else entry
    print(json.dumps(measure(entry, options.provider)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
