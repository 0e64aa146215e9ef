"""One picture a group of entries: the time of every provider over ours, in each mode."""

import os
from pathlib import Path
from typing import Any

from benchmarks.table import group_of
from dit_models.extras import require


def draw(folder: Path, results: list[dict[str, Any]], prefix: str = "") -> list[Path]:
    """Write ``<prefix><group>.png`` for every group that was timed.

    Raises:
        ImportError: without matplotlib; names the extra that installs it.
    """
    require("matplotlib", extra="bench")
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if result["modes"]:
            groups.setdefault(group_of(result), []).append(result)
    return [
        _figure(folder / f"{prefix}{group}.png", group, found) for group, found in groups.items()
    ]


def _figure(path: Path, title: str, results: list[dict[str, Any]]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(mode for result in results for mode in result["modes"]))
    figure = Figure(figsize=(2 + 1.1 * len(results) + 2, 2.6 * len(modes)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, mode in zip(figure.subplots(len(modes), squeeze=False)[:, 0], modes, strict=True):
        _panel(axes, mode, [result for result in results if mode in result["modes"]])
    figure.suptitle(f"{title}: time of others over ours (above 1: ours is faster)")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)
    return path


def _panel(axes: Any, mode: str, results: list[dict[str, Any]]) -> None:
    found = [result["modes"][mode]["ratios"] for result in results]
    providers = list(dict.fromkeys(name for ratios in found for name in ratios))
    width = 0.8 / max(len(providers), 1)
    for number, provider in enumerate(providers):
        places = [i for i, ratios in enumerate(found) if provider in ratios]
        middles = [found[i][provider]["median"] for i in places]
        spread = [
            [middle - found[i][provider]["low"] for i, middle in zip(places, middles, strict=True)],
            [
                found[i][provider]["high"] - middle
                for i, middle in zip(places, middles, strict=True)
            ],
        ]
        left = [i - 0.4 + (number + 0.5) * width for i in places]
        # From 1 up or down: the bar is the advantage or the disadvantage.
        heights = [middle - 1 for middle in middles]
        axes.bar(left, heights, width, 1, yerr=spread, label=provider, error_kw={"linewidth": 0.8})
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize=7)
    axes.set_ylabel(mode)
    labels = [result["name"].split("/", 1)[1] for result in results]
    axes.set_xticks(range(len(results)), labels, fontsize=7, rotation=15)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
