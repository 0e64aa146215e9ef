"""Which libraries take part on this machine, and why the others do not."""

from typing import Any

import torch

from benchmarks.libraries.library import Library
from benchmarks.libraries.table import LIBRARIES


def survey(device: torch.device | str) -> list[dict[str, Any]]:
    """One record a library, ready for JSON.

    ``status`` is ``"used"`` where it computes on the device, ``"importable"`` where its import
    works and only the device is missing, ``"skipped"`` where its import fails. ``reason`` also
    names the providers that a library in use has to leave out.
    """
    return [record(library, torch.device(device)) for library in LIBRARIES]


def record(library: Library, device: torch.device) -> dict[str, Any]:
    """The record of one library."""
    status = "used"
    if failed := library.why_not_importable():
        status, reasons = "skipped", [failed]
    else:
        reasons = [f"without {name}: {why}" for name, why in library.left_out().items()]
        if lacking := library.why_not_on(device):
            status, reasons = "importable", [lacking, *reasons]
    return {
        "name": library.name,
        "version": library.version(),
        "status": status,
        "reason": "; ".join(reasons),
        "install": list(library.install),
        "stages": list(library.stages),
        "providers": list(library.experts),
    }
