"""The compile check finds kernels that spill, overflow or ask for too much."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def toys():
    """What the check says of ``triton_toys``."""
    path = Path(__file__).with_name("triton_toys.py")
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_64_bit_rows_with_32_bit_columns_pass(toys):
    assert toys[0]["rows_wide"] == []


@pytest.mark.parametrize(
    ("kernel", "operation"),
    [("rows_narrow", "muli"), ("flat_narrow", "muli"), ("carried_narrow", "muli")],
)
def test_32_bit_addresses_of_large_tensors_are_found(toys, kernel, operation):
    (found,) = toys[0][kernel]  # the first operation of the chain, once
    assert kernel in found
    assert operation in found
    assert "x_ptr" in found
    assert "triton_toys.py:" in found


def figures(toys, case, arch="sm_80"):
    (found,) = (item for item in toys[1] if (item["case"], item["arch"]) == (case, arch))
    assert found["error"] == ""
    return found


@pytest.mark.parametrize(
    ("arch", "instruction"),
    [
        ("sm_80", "mma.sync"),
        ("sm_90", "wgmma"),
        ("sm_100", "tcgen05"),
        ("sm_120", "mma.sync"),
        ("gfx942", "v_mfma"),
    ],
)
def test_a_product_compiles_for_every_target(toys, arch, instruction):
    found = figures(toys, "fits", arch)
    assert found["broken"] == []
    assert found["figures"]["tensor_instructions"] == [instruction]
    assert found["figures"]["registers"] > 32
    assert found["figures"]["blocks"] >= 1
    assert found["figures"]["stack"] == found["figures"]["spills"] == 0
    # One or two tiles of two operands, 64 x 64 numbers of 2 bytes each.
    assert found["figures"]["shared"] >= 8192


def test_spills_are_found(toys):
    (problem,) = figures(toys, "spills")["broken"]
    assert "spills" in problem
    assert "product" in problem


def test_too_much_shared_memory_is_found(toys):
    (problem,) = figures(toys, "shared")["broken"]
    assert "shared memory" in problem


def test_arguments_are_specialised_as_at_a_launch(toys):
    assert toys[2] == {
        "x_ptr": "*bf16 /16",
        "index_ptr": "*i32",
        "out_ptr": "constant",
        "num_rows": "i32 /16",
    }


def test_grids_that_no_gpu_takes_are_found(toys):
    good, wide_y, wide_x = toys[3]
    assert good is None
    assert "grid y is 65,536" in wide_y
    assert "grid x" in wide_x


def row(**changes):
    from benchmarks.triton_check.rules import Row

    fields = {
        "kernel": "_toy_kernel",
        "arch": "sm_90",
        "case": "toy/xl/bfloat16",
        "tile": "M64 N128",
        "intended_blocks": 1,
        "registers": 128,
        "stack": 0,
        "spills": 0,
        "shared": 100_000,
        "warps": 4,
        "blocks": 2,
        "product": True,
        "tensor_instructions": ["wgmma"],
    }
    return Row("0123", {**copy.deepcopy(fields), **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blocks": 1, "registers": 255}, ["were 2, are 1", "128 -> 255", "--update"]),
        ({"tensor_instructions": []}, ["no longer has wgmma", "--update"]),
    ],
)
def test_what_was_lost_is_named(changes, words):
    from benchmarks.triton_check.rules import compare

    kept = {"triton": "3.9.0", "rows": {"0123": row().fields}}
    (problem,), _ = compare([row(**changes)], kept, "3.9.0")
    assert "_toy_kernel [sm_90 M64 N128] of toy/xl/bfloat16" in problem
    for word in words:
        assert word in problem


def test_more_registers_that_cost_nothing_pass():
    from benchmarks.triton_check.rules import compare

    kept = {"triton": "3.9.0", "rows": {"0123": row().fields}}
    assert compare([row(registers=130)], kept, "3.9.0")[0] == []


def test_another_triton_is_held_to_the_hard_rules_only():
    from benchmarks.triton_check.rules import broken, compare

    kept = {"triton": "3.8.0", "rows": {"0123": row().fields}}
    problems, remark = compare([row(blocks=1)], kept, "3.9.0")
    assert problems == []
    assert "3.8.0" in remark
    assert broken(row()) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"stack": 8, "spills": 2}, "2 spills"),
        ({"shared": 300_000, "blocks": 0}, "a block has 232,448"),
        ({"blocks": 1, "intended_blocks": 2}, "intended 2"),
        ({"tensor_instructions": []}, "without wgmma"),
    ],
)
def test_hard_rules(changes, word):
    from benchmarks.triton_check.rules import broken

    (problem,) = broken(row(**changes))
    assert word in problem


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        ("sm_90", 32, 0, 4, 16),  # 64 warps
        ("sm_90", 128, 0, 8, 2),  # 4096 registers a warp, 16 warps
        ("sm_90", 255, 0, 8, 1),
        ("sm_90", 255, 0, 16, 0),
        ("sm_80", 64, 81 * 1024, 4, 2),  # with 1 KB for the system each: 164 KB
        ("sm_80", 64, 82 * 1024, 4, 1),
        ("sm_120", 32, 0, 1, 24),
        ("gfx942", 128, 0, 4, 4),  # 4 waves in each of 4 SIMDs
        ("gfx942", 256, 40 << 10, 4, 1),
    ],
)
def test_blocks_on_a_processor(arch, registers, shared, warps, blocks):
    from benchmarks.triton_check.targets import GPUS, blocks_per_processor

    assert blocks_per_processor(GPUS[arch], registers, shared, warps) == blocks
