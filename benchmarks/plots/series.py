"""Time against tokens, experts, capacity or width: a line for each provider, a panel a mode."""

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
from benchmarks.plots.colours import OURS, style_of
from benchmarks.table import group_of

PANEL, HEIGHT = 4.6, 3.4

Exponents = dict[tuple[str, str, str], float]


def draw(folder: Path, document: dict[str, Any], prefix: str) -> list[Path]:
    """Write a picture for each series of at least two points."""
    paths = []
    for (series, device), results in series_of(document).items():
        name, machine = results[0]["axis"]["name"], machine_of(document, device)
        path = folder / (prefix + name_for(series, device))
        exponents = _exponents(results)
        modes = list(dict.fromkeys(mode for result in results for mode in result["modes"]))
        if not modes:
            continue
        figure = new_figure(max(PANEL * len(modes), 8.5), HEIGHT + legend_height(results) + HEAD)
        for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
            _panel(axes, results, mode, exponents)
            axes.set_xlabel(name, fontsize=SMALL + 1)
            axes.set_title(mode, fontsize=SMALL + 1)
        title = f"{series}: time against {name} (behind a name: exponent of the fitted power)"
        paths.append(finish(figure, path, title, machine))
    return paths


def series_of(document: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Entries with an axis by group and device, each in the order of its axis."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in document.get("entries", []):
        if result.get("axis"):
            found.setdefault((group_of(result), device_of(result)), []).append(result)
    return {
        key: sorted(results, key=lambda result: result["axis"]["value"])
        for key, results in found.items()
        if len({result["axis"]["value"] for result in results}) > 1
    }


def outside_series(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries without an axis, and what is the only point of its series."""
    drawn = series_of(document)
    return [
        result
        for result in document.get("entries", [])
        if not result.get("axis") or (group_of(result), device_of(result)) not in drawn
    ]


def _exponents(results: list[dict[str, Any]]) -> Exponents:
    from benchmarks.scaling import exponents

    return {
        (found["series"], found["mode"], found["provider"]): found["exponent"]
        for found in exponents(results)
    }


def _panel(axes: Any, results: list[dict[str, Any]], mode: str, exponents: Exponents) -> None:
    providers = dict.fromkeys(
        name for result in results for name in result["modes"].get(mode, {}).get("times", {})
    )
    # Ours last, so that it lies on top.
    for provider in sorted(providers, key=lambda name: name == OURS):
        points = [
            (result["axis"]["value"], result["modes"][mode]["times"][provider])
            for result in results
            if provider in result["modes"].get(mode, {}).get("times", {})
        ]
        x = [value for value, _ in points]
        style, exponent = style_of(provider), exponents.get((group_of(results[0]), mode, provider))
        label = provider if exponent is None else f"{provider}  {exponent:.2f}"
        draw_line(axes, x, [time["median"] * 1e3 for _, time in points], provider, label)
        low, high = ([time[end] * 1e3 for _, time in points] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)
    log_axes(axes, [result["axis"]["value"] for result in results])
    axes.set_ylabel("ms", fontsize=SMALL + 1)
    legend_below(axes)


def legend_below(axes: Any) -> None:
    """Under the panel, where no line runs; ours first."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        fontsize=SMALL,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=2,
    )


def legend_height(results: list[dict[str, Any]]) -> float:
    """Inches of a legend in two columns."""
    providers = {name for result in results for name in result["providers"]}
    return 0.17 * (-(-len(providers) // 2) + 1)


def draw_line(axes: Any, x: list[float], y: list[float], provider: str, label: str) -> None:
    """A provider's line; ours is thick."""
    style, ours = style_of(provider), provider == OURS
    axes.plot(
        x,
        y,
        color=style.colour,
        marker=style.marker,
        markersize=6 if ours else 5,
        linewidth=2.8 if ours else 1.2,
        label=label,
        zorder=3 if ours else 2,
    )


def log_axes(axes: Any, values: list[float]) -> None:
    """Both axes logarithmic, the measured sizes as ticks, plain numbers."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted(set(values))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_minor_locator(_minor())
    for of_axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        of_axis("{x:g}")
    axes.grid(axis="y", which="both", color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)
    plain(axes)


def _minor() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(2.0, 5.0))
