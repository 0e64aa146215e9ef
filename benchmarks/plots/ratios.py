"""Bars of other/ours: one picture for each group of entries that is no series."""

from pathlib import Path
from typing import Any

from benchmarks.digest import device_of
from benchmarks.plots import bars
from benchmarks.plots.canvas import (
    HEAD,
    MARGIN,
    SMALL,
    entry_words,
    finish,
    machine_of,
    name_for,
    new_figure,
)
from benchmarks.plots.series import outside_series
from benchmarks.table import group_of

PANEL = 3.0
LABELS = 1.6  # inches for the names at the left


def draw(folder: Path, document: dict[str, Any], prefix: str) -> list[Path]:
    """Write a picture, or several of about the same length, for each group."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in outside_series(document):
        if any(mode["ratios"] for mode in result["modes"].values()):
            groups.setdefault((group_of(result), device_of(result)), []).append(result)
    paths = []
    for (group, device), results in groups.items():
        pages = bars.pages([_block(result) for result in results])
        for number, page in enumerate(pages, 1):
            kind = group if number == 1 else f"{group}-{number}"
            part = f" ({number} of {len(pages)})" if len(pages) > 1 else ""
            title = f"{group}{part}: time of others over ours (right of 1: ours is faster)"
            path = folder / (prefix + name_for(kind, device))
            paths.append(_picture(path, page, title, machine_of(document, device)))
    return paths


def _block(result: dict[str, Any]) -> bars.Block:
    panels = {}
    for mode, found in result["modes"].items():
        panels[mode] = [
            bars.Bar(name, ratio["median"], _times(ratio["median"]), ratio["low"], ratio["high"])
            for name, ratio in found["ratios"].items()
        ]
    return bars.Block(entry_words(result), panels)


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio >= 9.95 else f"{ratio:.2f}x"


def _picture(path: Path, blocks: list[bars.Block], title: str, machine: str) -> Path:
    modes = list(dict.fromkeys(mode for block in blocks for mode in block.panels))
    height = max(bars.height_of(blocks) + MARGIN + HEAD, 2.0)
    figure = new_figure(LABELS + PANEL * max(len(modes), 2), height)
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    bars.draw_labels(panels[0], blocks)
    for axes, mode in zip(panels, modes, strict=True):
        bars.draw_bars(axes, blocks, mode, 1.0)
        axes.axvline(1.0, color="black", linewidth=0.9)
        axes.set_xscale("log")
        _scale(axes, blocks, mode)
        axes.set_title(mode, fontsize=SMALL + 1)
    return finish(figure, path, title, machine)


def _scale(axes: Any, blocks: list[bars.Block], mode: str) -> None:
    """Limits that leave room for the words, and ticks that are plain numbers."""
    found = [bar for block in blocks for bar in block.panels.get(mode, [])]
    least = min([1.0, *(bar.low for bar in found if bar.low)])
    most = max([1.0, *(bar.high for bar in found if bar.high)])
    room = max(most / least, 1.5)
    axes.set_xlim(least / room**0.04, most * room**0.3)
    ticks = _ticks(least, most)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers, as many as do not run into each other."""
    span = most / least
    if span > 100:
        digits: tuple[float, ...] = (1,)
    else:
        digits = (1, 2, 5) if span > 3 else (1, 1.2, 1.5, 2, 3, 4, 6, 8)
    return [
        digit * 10.0**power
        for power in range(-4, 5)
        for digit in digits
        if least * 0.9 <= digit * 10.0**power <= most * 1.1
    ]
