"""The kept table: figures as JSON, and the same to read."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import triton

from benchmarks.triton_check.rules import Row
from dit_models.atomic import write_text

RESULTS = Path(__file__).resolve().parent.parent / "results"
TABLE = RESULTS / "triton-compiled.json"
_COLUMNS = (
    "dtype",
    "tile",
    "warps, stages",
    "registers",
    "shared",
    "spills",
    "blocks",
    "instruction",
    "first case",
)


def read(path: Path = TABLE) -> dict[str, Any]:
    """The table: ``triton`` (version) and ``rows`` by key; empty where there is none."""
    if not path.exists():
        return {"triton": None, "rows": {}}
    document = json.loads(path.read_text())
    assert isinstance(document, dict)
    return document


def write(rows: Iterable[Row], path: Path = TABLE) -> None:
    """Replace the table and the page beside it."""
    ordered = sorted(rows, key=lambda row: (row.fields["kernel"], row.fields["arch"], row.key))
    # One row a line, so that a change of one kernel is a change of its lines; zeros are left out.
    lines = [f"  {json.dumps(row.key)}: {json.dumps(_nonzero(row))}" for row in ordered]
    head = f'{{\n "triton": {json.dumps(triton.__version__)},\n "rows": {{\n'
    write_text(path, head + ",\n".join(lines) + "\n }\n}\n")
    write_text(path.with_suffix(".md"), markdown(ordered))


def _nonzero(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.fields.items() if value}


def markdown(rows: list[Row]) -> str:
    """A table for each kernel."""
    lines = [
        "# Triton kernels as compiled",
        "",
        f"Compiled ahead of time by Triton {triton.__version__}, no GPU involved: "
        "`python -m benchmarks.triton_check --update`. Nothing here is a measurement of speed. "
        "*registers*: of a thread (AMD: vector registers); *shared*: bytes of a block; *blocks*: "
        "that fit on one processor at once by registers, shared memory, tensor memory and warps; "
        "*spills*: registers kept in memory. *dtype*: of the first floating-point pointer.",
        "",
        *_summary(rows),
    ]
    for kernel in dict.fromkeys(row.fields["kernel"] for row in rows):
        lines += ["", f"## {kernel}", ""]
        lines += ["| target | " + " | ".join(_COLUMNS) + " |"]
        lines += ["|---" * (len(_COLUMNS) + 1) + "|"]
        mine = [row for row in rows if row.fields["kernel"] == kernel]
        lines += dict.fromkeys(_line(row) for row in mine)
    return "\n".join(lines) + "\n"


def _summary(rows: list[Row]) -> Iterator[str]:
    yield "| target | binaries | kernels | most registers | most shared | fewest blocks |"
    yield "|---|---|---|---|---|---|"
    for arch in dict.fromkeys(row.fields["arch"] for row in rows):
        mine = [row.fields for row in rows if row.fields["arch"] == arch]
        yield (
            f"| {arch} | {len(mine)} | {len({f['kernel'] for f in mine})} "
            f"| {max(f['registers'] for f in mine)} | {max(f['shared'] for f in mine)} "
            f"| {min(f['blocks'] for f in mine)} |"
        )


def _line(row: Row) -> str:
    f = row.fields
    cells = [
        f["arch"],
        f["dtype"],
        f["tile"],
        f"{f['num_warps']}, {f['num_stages']}",
        str(f["registers"]),
        str(f["shared"]),
        str(f["spills"]),
        str(f["blocks"]),
        ", ".join(f["tensor_instructions"]),
        f["case"],
    ]
    return "| " + " | ".join(cells) + " |"
