"""Conversion streams: a checkpoint of a gigabyte passes through the memory of a block."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from dit_models.models import get_config

from .sparse import write_sparse

# The structure of DiT-MoE-G/2-16E2A with fewer and narrower blocks: 0.42 GB of fp16.
CONFIG = replace(get_config("DiT-MoE-G/2-16E2A"), depth=2, hidden_size=704, num_heads=8)
# Blocks of 16 MiB, what going back maps between two releases (64 MiB), and the allocator.
ALLOWED_MEGABYTES = 130


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's peak of memory")
def test_both_ways_take_a_small_part_of_the_file(tmp_path):
    source, back = tmp_path / "g.pt", tmp_path / "back.pt"
    write_sparse(source, CONFIG)
    assert source.stat().st_size > 3 * ALLOWED_MEGABYTES * 2**20
    command = [sys.executable, "-m", "tests.dit_models.convert.sparse", "--both"]
    done = subprocess.run(
        [*command, str(source), str(tmp_path / "ours"), str(back)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after_imports, peak = (float(word) for word in done.stdout.split()[:2])
    assert peak - after_imports < ALLOWED_MEGABYTES
    assert back.stat().st_size == pytest.approx(source.stat().st_size, rel=1e-3)
