"""The benchmark of swapped blocks measures every family that is installed."""

import pytest
import torch

from benchmarks.output import read
from benchmarks.swap.__main__ import main, row
from benchmarks.swap.blocks import BLOCKS
from benchmarks.swap.measure import memory, pair, step
from moe_kernels.integrations.swapped import Swapped


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_every_block_runs_and_one_of_the_pair_is_swapped(block):
    versions = pair(block, torch.device("cpu"))
    assert not isinstance(versions["original"], Swapped)
    assert isinstance(versions["swapped"], Swapped)
    inputs = [t.requires_grad_(t.is_floating_point()) for t in block.inputs(16)]
    for module in versions.values():
        step(module.train(), inputs, torch.randn(inputs[0].shape))


def test_results_are_written_and_never_over_others(tmp_path, capsys):
    words = ["--only", "8 experts", "--tokens", "16", "--seconds", "0.01", "--out"]
    words += [str(tmp_path / "results"), "--no-memory", "--device", "cpu"]
    assert main(words) == 0
    document = read(tmp_path / "results")
    (found,) = document["blocks"]
    assert found["tokens"]["16"]["both"]["ratio"] > 0
    assert found["graph_breaks"] == {"original": 2, "swapped": 0}
    printed = capsys.readouterr().out
    assert row(found) in printed
    assert row(found) in (tmp_path / "results" / "report.md").read_text()
    with pytest.raises(FileExistsError):
        main(words)


def test_memory_of_both_versions_is_measured():
    block = next(block for block in BLOCKS if block.name == "Nucleus-Image, 8 experts")
    found = memory(block, 64, torch.device("cpu"))
    for version in ("original", "swapped"):
        gradients = sum(p.nbytes for p in block.build().parameters())
        assert found[version]["peak"] > 0.9 * gradients
    assert found["saved_ratio"] == pytest.approx(
        found["swapped"]["saved"] / found["original"]["saved"]
    )
