"""What a binary must be like, and what it must not lose against the kept table."""

import re
from dataclasses import dataclass
from typing import Any

from benchmarks.triton_check.build import Built
from benchmarks.triton_check.specialize import Compilation
from benchmarks.triton_check.targets import GPUS

UPDATE = "python -m benchmarks.triton_check --update"


@dataclass(frozen=True)
class Row:
    """A binary as the table keeps it, in words and numbers of JSON."""

    key: str
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        """Kernel, target, tile and the case that launches it, for messages."""
        f = self.fields
        tile = f" {f['tile']}" if f["tile"] else ""
        return f"{f['kernel']} [{f['arch']}{tile}] of {f['case']}"


def row_of(built: Built) -> Row:
    """The table's row of a compilation that succeeded."""
    compilation, figures = built.compilation, built.figures
    assert figures is not None
    fields = {
        "kernel": compilation.kernel,
        "arch": compilation.arch,
        "case": compilation.case.name,
        "dtype": _dtype(compilation),
        "tile": _tile(compilation),
        "num_warps": compilation.num_warps,
        "num_stages": compilation.num_stages,
        "intended_blocks": compilation.intended_blocks,
        "registers": figures.registers,
        "scalar_registers": figures.scalar_registers,
        "stack": figures.stack,
        "spills": figures.spills,
        "shared": figures.shared,
        "tensor_columns": figures.tensor_columns,
        "warps": figures.warps,
        "blocks": figures.blocks,
        "product": figures.product,
        "tensor_instructions": list(figures.tensor_instructions),
    }
    return Row(compilation.key, fields)


def _tile(compilation: Compilation) -> str:
    """Block sizes: ``M128 N64 K32``."""
    blocks = [
        name.removeprefix("BLOCK_") + value
        for name, value in compilation.constants.items()
        if name.startswith("BLOCK_")
    ]
    return " ".join(blocks)


def _dtype(compilation: Compilation) -> str:
    """Of the first pointer or descriptor to floating-point numbers."""
    for kind in compilation.types.values():
        found = re.match(r"(?:\*|tensordesc<)((?:bf|fp)\d+)", kind)
        if found:
            return found.group(1)
    return ""


def broken(row: Row) -> list[str]:
    """Hard rules that a binary breaks, whatever was there before."""
    f, gpu, found = row.fields, GPUS[row.fields["arch"]], []
    if f["spills"] or f["stack"]:
        found.append(f"{f['stack']} bytes of stack, {f['spills']} spills; allowed 0")
    if f["shared"] > gpu.shared_block:
        found.append(f"{f['shared']:,} bytes of shared memory; a block has {gpu.shared_block:,}")
    elif f["blocks"] < f["intended_blocks"]:
        found.append(
            f"{f['registers']} registers, {f['shared']:,} bytes and {f['warps']} warps leave room "
            f"for {f['blocks']} blocks on a processor; intended {f['intended_blocks']}"
        )
    if f["product"] and not f["tensor_instructions"]:
        found.append(f"a 16-bit product without {' or '.join(gpu.tensor_instructions)}")
    return [f"{row.name}: {problem}" for problem in found]


def worse(row: Row, kept: dict[str, Any]) -> list[str]:
    """What a binary lost against its row in the table."""
    f, found = row.fields, []
    if f["blocks"] < kept.get("blocks", 0):
        found.append(
            f"blocks on a processor were {kept['blocks']}, are {f['blocks']} "
            f"(registers {kept['registers']} -> {f['registers']}, "
            f"shared memory {kept.get('shared', 0):,} -> {f['shared']:,})"
        )
    lost = sorted(set(kept.get("tensor_instructions", ())) - set(f["tensor_instructions"]))
    if lost:
        found.append(f"no longer has {', '.join(lost)}")
    return [f"{row.name}: {problem}; if that is meant: {UPDATE}" for problem in found]


def compare(rows: list[Row], kept: dict[str, Any], version: str) -> tuple[list[str], str]:
    """What was lost against the kept table, and a remark on what was compared.

    Args:
        rows: of this run.
        kept: the table, as ``report.read`` gives it.
        version: of Triton.
    """
    if kept["triton"] != version:
        return [], (
            f"The kept table is of Triton {kept['triton']}, this is {version}: only the hard rules "
            "were checked (spills, shared memory, intended blocks, instructions, addresses)."
        )
    known = kept["rows"]
    lost = [line for row in rows if row.key in known for line in worse(row, known[row.key])]
    new = sum(row.key not in known for row in rows)
    remark = f"{len(rows) - new} binaries compared with the kept table"
    return lost, f"{remark}; {new} are not in it: {UPDATE}" if new else remark
