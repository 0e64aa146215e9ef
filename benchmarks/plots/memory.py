"""Peak memory and what is kept for the backward: bars, and lines along a series."""

from pathlib import Path
from typing import Any

from benchmarks.digest import device_of
from benchmarks.plots import bars
from benchmarks.plots.canvas import (
    HEAD,
    MARGIN,
    SMALL,
    finish,
    machine_of,
    name_for,
    new_figure,
)
from benchmarks.plots.colours import OURS
from benchmarks.plots.series import (
    draw_line,
    legend_below,
    legend_height,
    log_axes,
    outside_series,
    series_of,
)

PARTS = {"peak_bytes": "peak", "saved_bytes": "kept for the backward"}
MIB = 2**20
PANEL, LABELS = 3.4, 1.6


def draw(folder: Path, document: dict[str, Any], prefix: str) -> list[Path]:
    """Write ``memory`` and, for each series with memory, ``memory-<series>``."""
    paths = []
    for device in ("cpu", "cuda"):
        results = [
            result
            for result in outside_series(document)
            if device_of(result) == device and _measured(result)
        ]
        pages = bars.pages([_block(result) for result in results]) if results else []
        for number, page in enumerate(pages, 1):
            kind = "memory" if number == 1 else f"memory-{number}"
            path = folder / (prefix + name_for(kind, device))
            paths.append(_bars(path, page, machine_of(document, device)))
    for (series, device), results in series_of(document).items():
        if sum(map(_measured, results)) > 1:
            path = folder / (prefix + name_for(f"memory-{series}", device))
            paths.append(_lines(path, series, results, machine_of(document, device)))
    return paths


def _measured(result: dict[str, Any]) -> bool:
    return any("peak_bytes" in found for found in result.get("memory", {}).values())


def _block(result: dict[str, Any]) -> bars.Block:
    panels = {
        part: [
            bars.Bar(name, found[part] / MIB, f"{found[part] / MIB:.1f}")
            for name, found in result["memory"].items()
            if part in found
        ]
        for part in PARTS
    }
    return bars.Block(result["name"], panels)


def _bars(path: Path, blocks: list[bars.Block], machine: str) -> Path:
    height = max(bars.height_of(blocks) + MARGIN + HEAD, 2.0)
    figure = new_figure(LABELS + PANEL * len(PARTS), height)
    panels = figure.subplots(1, len(PARTS), sharey=True)
    bars.draw_labels(panels[0], blocks)
    for axes, (part, words) in zip(panels, PARTS.items(), strict=True):
        bars.draw_bars(axes, blocks, part, 0.0)
        most = max(bar.value for block in blocks for bar in block.panels[part])
        axes.set_xlim(0, (most or 1.0) * 1.18)
        axes.set_title(f"{words}, MiB", fontsize=SMALL + 1)
    title = "Memory of one forward and backward (gradients are part of the peak)"
    return finish(figure, path, title, machine)


def _lines(path: Path, series: str, results: list[dict[str, Any]], machine: str) -> Path:
    name = results[0]["axis"]["name"]
    figure = new_figure(9.2, 3.2 + legend_height(results) + HEAD)
    for axes, (part, words) in zip(figure.subplots(1, len(PARTS)), PARTS.items(), strict=True):
        providers = dict.fromkeys(name for result in results for name in result["memory"])
        for provider in sorted(providers, key=lambda name: name == OURS):
            points = [
                (result["axis"]["value"], result["memory"][provider][part] / MIB)
                for result in results
                # Nothing kept has no place on a logarithmic axis.
                if result["memory"].get(provider, {}).get(part)
            ]
            draw_line(axes, [x for x, _ in points], [y for _, y in points], provider, provider)
        log_axes(axes, [result["axis"]["value"] for result in results])
        axes.set_xlabel(name, fontsize=SMALL + 1)
        axes.set_title(f"{words}, MiB", fontsize=SMALL + 1)
        legend_below(axes)
    return finish(figure, path, f"{series}: memory of one forward and backward", machine)
