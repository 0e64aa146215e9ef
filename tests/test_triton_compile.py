"""Every Triton kernel compiles for every target, without spills, no worse than the kept table."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import parts

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_for_every_target():
    # A process of its own: under TRITON_INTERPRET, which a session may have, nothing is compiled.
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    # It takes minutes: beside other tests it leaves half of the cores to them.
    jobs = parts.share_of_cores(min(parts.RUNNING, 2))
    command = [sys.executable, "-m", "benchmarks.triton_check", "--check", "--jobs", str(jobs)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    findings = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert result.returncode == 0, "\n".join(findings) or result.stderr
