"""Measures entries one after the other and writes each result at once, a line of JSON each.

A process of its own: what breaks the device's context (an access outside memory) or never returns
ends the process and not the measurement, see ``supervise.py``.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.check import first_line
from benchmarks.entry import MODES
from benchmarks.gpu.runner import Bench, run_entry
from benchmarks.runner import Settings
from benchmarks.suites import SUITES

# Below this nothing is started, and with less than that nothing compiles.
MIN_SECONDS = 8.0
COMPILE_SECONDS = 45.0
BROKEN_CONTEXT = 3


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; ``BROKEN_CONTEXT`` when the device cannot be used any more."""
    options = _parser().parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device)
    settings = settings_of(options)
    bench = Bench.on(device, settings)
    entries = {entry.name: entry for entry in SUITES[options.suite]}
    _write(options.out, {"rates": bench.limits.describe(torch.bfloat16)})
    for name in options.names:
        left = deadline - time.monotonic()
        if left < MIN_SECONDS:
            break
        compiled = settings.compiled and left > COMPILE_SECONDS
        current = replace(
            bench,
            settings=replace(settings, compiled=compiled),
            provider_seconds=min(bench.provider_seconds, left / 2),
        )
        _write(options.out, {"started": name})
        try:
            _write(options.out, {"result": run_entry(entries[name], current)})
        except Exception as error:
            _write(options.out, {"failed": name, "reason": first_line(error)})
        if device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                _write(options.out, {"broken": first_line(error)})
                return BROKEN_CONTEXT
    return 0


def settings_of(options: argparse.Namespace) -> Settings:
    """How long and what to measure."""
    return Settings(
        repeats=options.repeats,
        seconds=options.rounds_seconds,
        modes=tuple(options.modes),
        compiled=not options.no_compile,
        memory=not options.no_memory,
    )


def _write(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a") as stream:
        stream.write(json.dumps(line) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker")
    parser.add_argument("names", nargs="+", help="entries, in this order")
    parser.add_argument("--suite", default="gpu", choices=sorted(SUITES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, required=True, help="for all entries")
    parser.add_argument("--rounds-seconds", type=float, default=1.0, help="for one mode's rounds")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="lines of JSON are added to it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
