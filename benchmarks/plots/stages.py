"""Where the time of a layer goes: stacked bars of its stages, one bar for each provider."""

from pathlib import Path
from typing import Any

from benchmarks.digest import device_of
from benchmarks.plots.canvas import (
    HEAD,
    SMALL,
    finish,
    machine_of,
    name_for,
    new_figure,
    plain,
)
from benchmarks.plots.colours import OURS
from benchmarks.profiling.stages import BACKWARD, STAGES, in_order

# Of the stages, in their order: Tol's muted set.
COLOURS = (
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#DDCC77",
    "#999933",
    "#CC6677",
    "#882255",
    "#AA4499",
    "#117733",
    "#8C8C8C",
    "#DDDDDD",
)
HATCH = "////"
ROW = 0.34
# A share is written into its bar from this on.
WRITTEN = 0.07


def draw(folder: Path, document: dict[str, Any], prefix: str) -> list[Path]:
    """Write ``stages-<entry>`` for each entry that was profiled."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in document.get("stages", []):
        found.setdefault((row["entry"], device_of(row)), []).append(row)
    paths = []
    for (entry, device), rows in found.items():
        kind = "stages-" + entry.replace("/", "-")
        path = folder / (prefix + name_for(kind, device))
        paths.append(_picture(path, entry, rows, machine_of(document, device)))
    return paths


def _picture(path: Path, entry: str, rows: list[dict[str, Any]], machine: str) -> Path:
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    heights = [sum(row["mode"] == mode for row in rows) for mode in modes]
    figure = new_figure(9.6, sum(heights) * ROW + 0.5 * len(modes) + HEAD + 0.8)
    panels = figure.subplots(len(modes), 1, squeeze=False, height_ratios=heights)[:, 0]
    used: dict[str, Any] = {}
    for axes, mode in zip(panels, modes, strict=True):
        _panel(axes, [row for row in rows if row["mode"] == mode], used)
        axes.set_title(mode, fontsize=SMALL + 1)
    panels[-1].set_xlabel(
        "ms of a call under the profiler, one provider after the other: compare shares",
        fontsize=SMALL + 1,
    )
    names = [stage for stage in STAGES if stage in used]
    handles = [used[stage] for stage in names]
    if any(stage.endswith(BACKWARD) for row in rows for stage in row["stages"]):
        handles.append(panels[0].barh([0], [0], color="white", edgecolor="black", hatch=HATCH))
        names.append("its backward")
    figure.legend(
        handles, names, loc="outside lower center", ncols=6, fontsize=SMALL, frameon=False
    )
    return finish(figure, path, f"{entry}: which stage takes the time", machine)


def _panel(axes: Any, rows: list[dict[str, Any]], used: dict[str, Any]) -> None:
    """Stacked bars; ``used`` gets a bar of each stage for the legend."""
    longest = max(row["seconds"] for row in rows)
    for number, row in enumerate(rows):
        left = 0.0
        for name in [name for name in in_order() if row["stages"].get(name)]:
            spent = row["stages"][name]
            stage = name.removesuffix(BACKWARD)
            bar = axes.barh(
                number,
                spent * 1e3,
                0.74,
                left * 1e3,
                color=COLOURS[STAGES.index(stage)],
                edgecolor="white",
                linewidth=0.4,
                hatch=HATCH if name != stage else None,
            )
            if stage == name or stage not in used:
                used[stage] = bar
            if spent > WRITTEN * longest:
                _write_share(axes, (left + spent / 2) * 1e3, number, spent / row["seconds"])
            left += spent
    axes.set_yticks(range(len(rows)), [row["provider"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, longest * 1.02e3)
    plain(axes)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith(OURS) else "normal")


def _write_share(axes: Any, x: float, y: float, share: float) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    axes.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=SMALL, bbox=box)
