"""Choices that follow from measurements: the table of ``measured.json``, which is data.

``python -m benchmarks.choose`` writes it from results of ``make gpu-check``. Each entry says of one
op and GPU architecture which backend comes first there, and cites the measurement.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("measured.json")
RESULTS = "benchmarks/results/"


@dataclass(frozen=True)
class Measured:
    """One entry of the table.

    Attributes:
        op: one of ``backends.OPS``.
        arch: of the GPU, as ``architecture`` names it.
        backend: which the automatic choice takes first for this op there.
        over: the backend that it was compared with.
        ratio: how many times as fast as that one it was, median over the measured shapes.
        measurement: file of the results, from the repository's root.
        entries: names of the measured shapes.
    """

    op: str
    arch: str
    backend: str
    over: str
    ratio: float
    measurement: str
    entries: tuple[str, ...]

    def words(self) -> str:
        """The entry as a line of text, with the measurement cited."""
        return (
            f"{self.op} on {self.arch}: {self.backend}, {self.ratio:.2f}x as fast as {self.over} "
            f"({self.measurement}, {len(self.entries)} shapes)"
        )


Table = dict[tuple[str, str], Measured]


def read(path: Path, ops: Collection[str], backends: Collection[str]) -> Table:
    """The table by op and architecture.

    Args:
        path: of the JSON file, a list of objects with the fields of ``Measured``.
        ops, backends: the names that may occur.

    Raises:
        ValueError: for an entry that says something impossible; shows it.
    """
    entries = json.loads(path.read_text())
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}; expected a list of entries.")
    table: Table = {}
    for raw in entries:
        problem = _problem(raw, ops, backends)
        if problem is None and (raw["op"], raw["arch"]) in table:
            problem = "is the second one for this op and architecture; keep one"
        if problem is not None:
            raise ValueError(f"{path.name}: entry {json.dumps(raw)} {problem}.")
        entry = Measured(**{**raw, "entries": tuple(raw["entries"])})
        table[entry.op, entry.arch] = entry
    return table


def _problem(raw: Any, ops: Collection[str], backends: Collection[str]) -> str | None:
    """What is wrong with an entry; ``None`` when nothing is."""
    wanted = {field.name for field in fields(Measured)}
    if not isinstance(raw, dict) or set(raw) != wanted:
        return f"must be an object with exactly these keys: {', '.join(sorted(wanted))}"
    allowed = {"op": ops, "backend": backends, "over": backends}
    for key, names in allowed.items():
        if raw[key] not in names:
            return f"has {key} {raw[key]!r}; expected one of {', '.join(names)}"
    if raw["backend"] == raw["over"]:
        return f"compares backend {raw['backend']!r} with itself; name another one in 'over'"
    if re.fullmatch(r"sm_\d+|gfx\w+", str(raw["arch"])) is None:
        return f"has arch {raw['arch']!r}; expected something like 'sm_90' or 'gfx942'"
    if not isinstance(raw["ratio"], int | float) or not raw["ratio"] > 0:
        return f"has ratio {raw['ratio']!r}; expected a positive number"
    cited = str(raw["measurement"])
    if not cited.startswith(RESULTS) or not cited.endswith(".json"):
        return f"cites {cited!r}; expected a file {RESULTS}<name>.json"
    names = raw["entries"]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        return f"has entries {names!r}; expected a list of names of measured shapes"
    return None


def architecture(device_type: str, index: int | None) -> str | None:
    """``"sm_90"`` or ``"gfx942"``, say; ``None`` where there is no such GPU.

    Args:
        device_type: of a ``torch.device``.
        index: of the GPU; ``None`` is the current one.
    """
    if device_type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.split(":")[0]  # the rest is settings: gfx942:sramecc+:xnack-
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
