"""How long the first call of a process takes, compiling included."""

from pathlib import Path
from typing import Any

from benchmarks.plots import bars
from benchmarks.plots.canvas import (
    HEAD,
    MARGIN,
    SMALL,
    finish,
    new_figure,
    one_for_each_device,
)


def draw(folder: Path, document: dict[str, Any], prefix: str) -> list[Path]:
    """Write ``compile`` for each device that first calls were timed on."""
    rows = [row for row in document.get("compile", []) if row.get("first_seconds")]
    return one_for_each_device("compile", rows, _picture, folder, document, prefix)


def _picture(path: Path, rows: list[dict[str, Any]], machine: str) -> Path:
    by_name: dict[str, list[bars.Bar]] = {}
    for row in rows:
        seconds = row["first_seconds"]
        words = f"{seconds:.3g} s"
        if row.get("steady_seconds"):
            words += f"  (then {row['steady_seconds'] * 1e3:.3g} ms)"
        by_name.setdefault(row["name"], []).append(bars.Bar(row["provider"], seconds, words))
    blocks = [bars.Block(name, {"first": found}) for name, found in by_name.items()]
    figure = new_figure(7.6, max(bars.height_of(blocks) + MARGIN + HEAD, 2.0))
    axes = figure.subplots(1, 1)
    bars.draw_labels(axes, blocks)
    bars.draw_bars(axes, blocks, "first", 0.0)
    axes.set_xlim(0, 1.4 * max(row["first_seconds"] for row in rows))
    axes.set_xlabel("seconds of the first call", fontsize=SMALL + 1)
    title = "First call in a fresh process, without a cache of compiled code"
    return finish(figure, path, title, machine)
