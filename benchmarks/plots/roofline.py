"""Reached FLOP/s over arithmetic intensity, under the rates that were measured on the machine."""

from pathlib import Path
from typing import Any, NamedTuple

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
from benchmarks.plots.colours import OURS, STYLES
from benchmarks.table import group_of

PANEL, HEIGHT = 4.6, 4.0
PEER_COLOUR = "#0072B2"
MARKERS = "osD^v<>Ph*"
DASHES = ("--", ":", "-.")
ROOM = 4.0  # room on both sides of the points, so that at least one power of ten is labelled
TITLE = "Roofline: ours (filled) and the fastest alternative (hollow) of each entry"


class Point(NamedTuple):
    """One entry in one mode: FLOPs per byte, and FLOP/s of ours and of the fastest other."""

    stage: str
    intensity: float
    ours: float
    peer: float | None


class Roofs(NamedTuple):
    """Measured rates: FLOP/s of large products by dtype, bytes/s of a large copy."""

    products: dict[str, float]
    copy: float | None


def draw(folder: Path, document: dict[str, Any], prefix: str) -> list[Path]:
    """Write ``roofline``, one for each device that has points and a measured roof."""
    paths = []
    for device in ("cpu", "cuda"):
        points = points_of(document, device)
        roofs = roofs_of(document, device)
        if points and (roofs.products or roofs.copy):
            path = folder / (prefix + name_for("roofline", device))
            paths.append(_picture(path, points, roofs, machine_of(document, device)))
    return paths


def points_of(document: dict[str, Any], device: str) -> dict[str, list[Point]]:
    """Points by mode; entries without counted arithmetic have none."""
    found: dict[str, list[Point]] = {}
    for result in document.get("entries", []):
        # A call on 16 tokens says nothing about rates.
        if device_of(result) != device or group_of(result) == "overhead":
            continue
        for mode, of_mode in result["modes"].items():
            cost = of_mode.get("cost", {})
            if not cost.get("flops") or not cost.get("bytes") or OURS not in of_mode["times"]:
                continue
            plain_times = [
                time["median"]
                for name, time in of_mode["times"].items()
                if result["providers"][name]["kind"] == "plain"
            ]
            point = Point(
                result["stage"],
                cost["flops"] / cost["bytes"],
                cost["flops"] / of_mode["times"][OURS]["median"],
                cost["flops"] / min(plain_times) if plain_times else None,
            )
            found.setdefault(mode, []).append(point)
    return found


def roofs_of(document: dict[str, Any], device: str) -> Roofs:
    """What was measured of the device; a GPU's rates are those of a bf16 product and a copy."""
    rates = {**document.get("settings", {}), **document.get("rates", {})}
    if device == "cpu":
        return Roofs(dict(rates.get("product") or {}), rates.get("copy"))
    product, copy = rates.get("product_tflops"), rates.get("copy_tb_s")
    return Roofs({"bfloat16": product * 1e12} if product else {}, copy * 1e12 if copy else None)


def _picture(path: Path, points: dict[str, list[Point]], roofs: Roofs, machine: str) -> Path:
    stages = list(dict.fromkeys(point.stage for found in points.values() for point in found))
    marker_of = {stage: MARKERS[number % len(MARKERS)] for number, stage in enumerate(stages)}
    figure = new_figure(PANEL * max(len(points), 2), HEIGHT + HEAD)
    panels = figure.subplots(1, len(points), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (mode, found) in zip(panels, points.items(), strict=True):
        for point in found:
            _draw_point(axes, point, marker_of[point.stage])
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1000 else f"{x:g}")
            axis.set_minor_formatter("")
        axes.set_title(mode, fontsize=SMALL + 1)
        axes.set_xlabel("FLOP per byte that has to move", fontsize=SMALL + 1)
        plain(axes)
        axes.grid(color="#EEEEEE", linewidth=0.6)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("GFLOP/s", fontsize=SMALL + 1)
    handles = [
        panels[0].plot([], [], marker, color="#555555", label=stage, markersize=6)[0]
        for stage, marker in marker_of.items()
    ]
    handles += _draw_roofs(panels, points, roofs)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=5, fontsize=SMALL, frameon=False
    )
    return finish(figure, path, TITLE, machine)


def _draw_point(axes: Any, point: Point, marker: str) -> None:
    if point.peer is not None:
        both = [point.peer * 1e-9, point.ours * 1e-9]
        axes.plot([point.intensity] * 2, both, color="#BBBBBB", linewidth=0.8, zorder=1)
        axes.plot(
            point.intensity, point.peer * 1e-9, marker, mfc="white", mec=PEER_COLOUR, markersize=6
        )
    colour = STYLES[OURS].colour
    axes.plot(
        point.intensity, point.ours * 1e-9, marker, mfc=colour, mec="white", markersize=8, zorder=3
    )


def _draw_roofs(panels: Any, points: dict[str, list[Point]], roofs: Roofs) -> list[Any]:
    """The slope of the copy, and each product's level from there on; the lines of one panel."""
    intensities = [point.intensity for found in points.values() for point in found]
    least, most = min(intensities) / ROOM, max(intensities) * ROOM
    highest = max(roofs.products.values(), default=None)
    lines: list[Any] = []
    for axes in panels:
        lines = []
        if roofs.copy:
            end = most if highest is None else min(most, highest / roofs.copy)
            ends = [least, max(end, least)]
            slope = [x * roofs.copy * 1e-9 for x in ends]
            lines.append(_roof(axes, ends, slope, "-", f"large copy: {_giga(roofs.copy)}B/s"))
        for (dtype, rate), dashes in zip(roofs.products.items(), DASHES, strict=False):
            begin = max(rate / roofs.copy, least) if roofs.copy else least
            if begin < most:
                words = f"{dtype} product: {_giga(rate)}FLOP/s"
                lines.append(_roof(axes, [begin, most], [rate * 1e-9] * 2, dashes, words))
        axes.set_xlim(least, most)
    return lines


def _roof(axes: Any, x: list[float], y: list[float], dashes: str, words: str) -> Any:
    return axes.plot(x, y, color="black", linestyle=dashes, linewidth=1.0, label=words)[0]


def _giga(rate: float) -> str:
    return f"{rate * 1e-12:.3g} T" if rate >= 1e12 else f"{rate * 1e-9:.3g} G"
