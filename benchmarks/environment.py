"""The header of every result: hardware, versions, threads, who serves which op, commit."""

import datetime
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moe_kernels as mk
from benchmarks.entry import CPU
from benchmarks.gpu import hardware
from moe_kernels.backends import OPS, resolve

ROOT = Path(__file__).resolve().parent.parent
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def served_by(op: str, device: torch.device = CPU) -> str:
    """Module of the function that serves an op on a device now."""
    serves = resolve(op, device)
    backend = getattr(getattr(serves, "__self__", None), "backend", None)  # shared by backends
    return serves.__module__ if backend is None else f"moe_kernels.backends.{backend}"


def describe(
    arguments: Sequence[str], device: torch.device = CPU, module: str = "benchmarks.run"
) -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat the numbers.

    Args:
        arguments: of the command.
        device: that is measured.
        module: of the command.
    """
    model, flags = _cpu()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *arguments]),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "isa": {flag: flag in flags for flag in ISA_FLAGS},
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "blas": _blas(),
        "moe_kernels": mk.__version__,
        "served_by": {op: served_by(op, device) for op in OPS},
        **_git(),
        **({"device": hardware.describe(device)} if device.type == "cuda" else {}),
    }


def _cpu() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return (
        name.group(1) if name else platform.machine(),
        set(flags.group(1).split()) if flags else set(),
    )


def _blas() -> str:
    config = torch.__config__.show()
    kind = re.search(r"BLAS_INFO=(\w+)", config)
    version = re.search(r"Math Kernel Library Version ([\w.-]+)|OpenBLAS ([\w.]+)", config)
    words = [kind.group(1) if kind else "unknown"]
    return " ".join(words + ([next(filter(None, version.groups()))] if version else []))


def _git() -> dict[str, Any]:
    """Commit, and whether anything but earlier results differs from it."""
    commit = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
