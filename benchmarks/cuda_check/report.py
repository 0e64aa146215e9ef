"""The kept table: figures as JSON, and the same to read."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.cuda_check.rules import Row
from dit_models.atomic import write_text

RESULTS = Path(__file__).resolve().parent.parent / "results"
TABLE = RESULTS / "cuda-compiled.json"


def read(path: Path = TABLE) -> dict[str, Any]:
    """The table: ``nvcc`` (version) and ``rows`` by key; empty where there is none."""
    if not path.exists():
        return {"nvcc": None, "rows": {}}
    document = json.loads(path.read_text())
    assert isinstance(document, dict)
    return document


def write(rows: Iterable[Row], version: str, path: Path = TABLE) -> None:
    """Replace the table and the page beside it."""
    ordered = sorted(rows, key=_order)
    # One row a line, so that a change of one kernel is a change of its lines; zeros are left out.
    lines = [f"  {json.dumps(row.key)}: {json.dumps(_nonzero(row))}" for row in ordered]
    head = f'{{\n "nvcc": {json.dumps(version)},\n "rows": {{\n'
    write_text(path, head + ",\n".join(lines) + "\n }\n}\n")
    write_text(path.with_suffix(".md"), markdown(ordered, version))


def _order(row: Row) -> tuple[str, str, int]:
    f = row.fields
    return f["file"], f["kernel"], _number(f["arch"])


def _number(arch: str) -> int:
    return int("".join(filter(str.isdigit, arch)))


def _nonzero(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.fields.items() if value}


def markdown(rows: list[Row], version: str) -> str:
    """A table for each file: a kernel a line, an architecture a column."""
    archs = sorted({row.fields["arch"] for row in rows}, key=_number)
    lines = [
        "# CUDA kernels as compiled",
        "",
        f"Compiled by {version}, no GPU involved: `python -m benchmarks.cuda_check --update`. "
        "Nothing here is a measurement of speed. Under an architecture: registers of a thread. "
        "*shared*: bytes of a block that are known before the launch, the most of all "
        "architectures. *stack*, *spills*: bytes of a thread, likewise.",
    ]
    for file in dict.fromkeys(row.fields["file"] for row in rows):
        lines += ["", f"## {file}.cu", ""]
        lines += ["| kernel | " + " | ".join([*archs, "shared", "stack", "spills"]) + " |"]
        lines += ["|---" * (len(archs) + 4) + "|"]
        mine = [row.fields for row in rows if row.fields["file"] == file]
        for kernel in dict.fromkeys(f["kernel"] for f in mine):
            lines.append(_line(kernel, archs, [f for f in mine if f["kernel"] == kernel]))
    return "\n".join(lines) + "\n"


def _line(kernel: str, archs: list[str], mine: list[dict[str, Any]]) -> str:
    registers = {f["arch"]: str(f["registers"]) for f in mine}
    cells = [f"`{kernel}`", *(registers.get(arch, "") for arch in archs)]
    cells.append(str(max(f["shared"] for f in mine)))
    cells.append(str(max(f["stack"] for f in mine)))
    cells.append(str(max(f["spill_stores"] + f["spill_loads"] for f in mine)))
    return "| " + " | ".join(cells) + " |"
