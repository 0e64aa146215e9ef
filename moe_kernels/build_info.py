"""What the build left behind: which compiled modules there are, and why others are missing."""

import json
from pathlib import Path
from typing import Any

_RECORD = Path(__file__).with_name("_build.json")


def build_record() -> dict[str, Any]:
    """Return the record of the build; empty where nothing was ever installed.

    Its entries are ``cpu``, ``cuda`` and ``simulated``, the last for ``_cuda_simulated``. Each has
    ``built``, ``reason`` (why not), ``compiler`` and ``sanitize``; a built ``cpu`` also ``isas``, a
    built ``cuda`` also ``archs``.
    """
    if not _RECORD.exists():
        return {}
    record: dict[str, Any] = json.loads(_RECORD.read_text())
    return record


def why_not_built(module: str) -> str:
    """Say why the module of that entry cannot be imported, and what to do about it."""
    record = build_record()
    if not record:
        return "was not built: this is a source tree that was never installed; run pip install -e ."
    if module not in record:
        return f"was not built: this version has no {module} module"
    if record[module]["built"]:
        return "was built, but not for this Python; run pip install again with this Python"
    return f"was not built: {record[module]['reason']}"
