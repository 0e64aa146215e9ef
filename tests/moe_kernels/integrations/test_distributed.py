"""Swapped models under DDP and FSDP2; ``distributed_worker.py`` has the scenarios."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="two of the models are those of diffusers")
pytest.importorskip("transformers", reason="one of the models is that of transformers")
if not hasattr(os, "fork"):
    pytest.skip("the processes are forked", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def backend():
    """The processes have their own."""


def test_two_processes_get_what_the_original_gets_in_one(tmp_path):
    """All scenarios at once: most of the time goes into the imports that they share."""
    command = [sys.executable, "-m", "tests.moe_kernels.integrations.distributed_worker"]
    result = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    failures = json.loads(result.stdout.splitlines()[-1])
    assert not failures, "\n\n".join(f"{name}:\n{text}" for name, text in failures.items())
