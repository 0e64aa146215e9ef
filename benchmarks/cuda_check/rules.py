"""What a kernel must be like, and what it must not lose against the kept table."""

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.cuda_check.remarks import Figures

UPDATE = "python -m benchmarks.cuda_check --update"

# Bytes of stack that a kernel needs for a reason, by its name, with the reason beside it.
STACK_ALLOWED: dict[str, int] = {}

# Small changes of the source move the count by this much either way.
MORE_REGISTERS = 4
# Figures that must not grow: field, words, slack.
COMPARED = (
    ("registers", "registers", MORE_REGISTERS),
    ("shared", "bytes of static shared memory", 0),
)


@dataclass(frozen=True)
class Row:
    """A kernel on an architecture as the table keeps it, in words and numbers of JSON."""

    fields: dict[str, Any]

    @property
    def key(self) -> str:
        """The same in the next build, as long as nobody renames the kernel."""
        return f"{self.fields['file']}: {self.fields['kernel']} [{self.fields['arch']}]"


def row_of(file: str, kernel: str, figures: Figures) -> Row:
    """The table's row of a kernel of ``file``."""
    fields = asdict(figures)
    del fields["symbol"]
    return Row({"file": file, "kernel": kernel, **fields})


def broken(row: Row) -> list[str]:
    """Hard rules that a kernel breaks, whatever was there before."""
    f, found = row.fields, []
    if f["spill_stores"] or f["spill_loads"]:
        found.append(
            f"spills {f['spill_stores']} bytes and loads {f['spill_loads']}; allowed 0: "
            "hold fewer values at once, or launch fewer threads"
        )
    allowed = STACK_ALLOWED.get(f["kernel"], 0)
    if f["stack"] > allowed:
        found.append(
            f"{f['stack']} bytes of stack; allowed {allowed}: "
            "index arrays of a thread by constants, in loops that unroll"
        )
    return [f"{row.key}: {problem}" for problem in found]


def worse(row: Row, kept: dict[str, Any]) -> list[str]:
    """What a kernel lost against its row in the table."""
    found = []
    for field, words, slack in COMPARED:
        was, now = kept.get(field, 0), row.fields[field]
        if now > was + slack:
            found.append(f"{row.key}: {words} were {was}, are {now}; if that is meant: {UPDATE}")
    return found


def compare(rows: list[Row], kept: dict[str, Any], version: str) -> tuple[list[str], str]:
    """What differs from the kept table for the worse, or in its kernels; and what was compared.

    Architectures that only one of the two has are not compared.

    Args:
        rows: of this build.
        kept: the table, as ``report.read`` gives it.
        version: of nvcc, in words.
    """
    if kept["nvcc"] != version:
        return [], (
            f"The kept table is of {kept['nvcc']}, this is {version}: only the hard rules were "
            "checked (spills, stack)."
        )
    known = kept["rows"]
    built, keys = {row.fields["arch"] for row in rows}, {row.key for row in rows}
    archs = built & {fields["arch"] for fields in known.values()}
    found, compared = [], 0
    for row in rows:
        if row.key in known:
            compared += 1
            found += worse(row, known[row.key])
        elif row.fields["arch"] in archs:
            found.append(f"{row.key} is not in the kept table: run {UPDATE}")
    found += [
        f"{key} is gone, the kept table has it; if that is meant: {UPDATE}"
        for key, fields in known.items()
        if key not in keys and fields["arch"] in archs
    ]
    remark = f"{compared} kernels compared with the kept table"
    if built - archs:
        remark += f"; it has nothing for {', '.join(sorted(built - archs))}"
    return found, remark
