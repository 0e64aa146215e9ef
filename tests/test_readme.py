"""What the README shows is run as it is written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_python_blocks_of_the_readme_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    code = (
        "\n".join(blocks) + "\nassert out.sample.shape == (2, 4, 32, 32) and len(out.plans) == 6\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_example_trains_an_ec_moe_layer():
    example = ROOT / "examples" / "train_moe_layer.py"
    lines = [line for line in example.read_text().splitlines() if line.strip()]
    assert len(lines) <= 22
    result = subprocess.run([sys.executable, str(example)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    losses = [float(line.split()[3]) for line in result.stdout.splitlines()]
    assert len(losses) == 5
    assert losses[-1] < 0.25 * losses[0]


@pytest.mark.parametrize("name", ["swap_hidream", "swap_transformers"])
def test_examples_of_the_swap_run_as_written(name):
    example = ROOT / "examples" / f"{name}.py"
    result = subprocess.run([sys.executable, str(example)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "swapped" in result.stdout
    differences = re.findall(r"largest difference (\S+) of (\S+)", result.stdout)
    assert differences
    assert all(float(d) < 1e-5 * float(largest) for d, largest in differences)
    if name == "swap_hidream":
        assert "after revert: the same bits as before" in result.stdout


def test_links_of_the_documents_lead_somewhere():
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target.split("#")[0]).exists(), f"{document}: {target}"
