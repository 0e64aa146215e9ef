"""``figures.json``: every measurement with all its settings; and the same as a printed table."""

import json
import platform
from pathlib import Path
from typing import Any

import torch

import moe_kernels
from dit_models.atomic import write_text
from dit_models.evaluate.scenes import scene_geneval_table

FIGURES_NAME = "figures.json"


def measurement(
    kind: str, settings: dict[str, Any], figures: dict[str, Any], device: str = "cpu"
) -> dict[str, Any]:
    """One entry of ``figures.json``; ``device`` is where the judging network ran."""
    return {
        "kind": kind,
        "settings": settings,
        "figures": figures,
        "device": device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "moe_kernels": moe_kernels.__version__,
        },
    }


def save_measurements(path: Path, samples: dict[str, Any], new: list[dict[str, Any]]) -> None:
    """Add measurements to a file; one of the same kind and settings is replaced, others stay.

    Args:
        path: the file.
        samples: what was measured: the settings of the images.
        new: from ``measurement``.

    Raises:
        ValueError: the file is damaged, or holds figures of other images.
    """
    kept: list[dict[str, Any]] = []
    plain = json.loads(json.dumps({"samples": samples, "measurements": new}))
    if path.exists():
        try:
            saved = json.loads(path.read_text())
            if saved["samples"] != plain["samples"]:
                raise ValueError("it holds figures of other images")
            kept = saved["measurements"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be added to: {error}; choose another file.") from error
    replaced = [(entry["kind"], entry["settings"]) for entry in plain["measurements"]]
    kept = [entry for entry in kept if (entry["kind"], entry["settings"]) not in replaced]
    plain["measurements"] = [*kept, *plain["measurements"]]
    write_text(path, json.dumps(plain, indent=2) + "\n")


def print_measurements(entries: list[dict[str, Any]]) -> None:
    """Print the figures as a table."""
    for entry in entries:
        print(f"{entry['kind']}:")
        for name, value in entry["figures"].items():
            if isinstance(value, (int, float)):
                print(f"  {name:<24}{value:.6g}")
        if "geneval" in entry["figures"]:
            print(scene_geneval_table(entry["figures"]["geneval"]))
