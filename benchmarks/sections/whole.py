"""Whole models, and where the time of a layer goes."""

from collections.abc import Iterator
from typing import Any

from benchmarks.sections.view import folded
from benchmarks.words import duration, listed, ratio, share, spread, table

SMALL = 0.02  # a stage with less of the time is not named


def models(document: dict[str, Any]) -> Iterator[str]:
    """Seconds and images a second of every side."""
    found = document.get("models", [])
    if not found:
        return
    yield (
        "Above 1 ours is faster. A dense twin is another model, of the same width, depth and "
        "arithmetic, and no alternative."
    )
    yield ""
    rows = [_model_row(model) for model in found]
    columns = ("model", "images", "time", "images/s", "other/ours", "quartiles")
    yield from table(columns, rows)
    yield ""


def _model_row(model: dict[str, Any]) -> tuple[str, ...]:
    seconds, rates = model["seconds"], model.get("images_per_second", {})
    quartiles = model.get("quartiles")
    return (
        model["name"],
        str(model["batch_size"]),
        listed(f"{name} {duration(value)}" for name, value in seconds.items()),
        listed(f"{name} {value:.3g}" for name, value in rates.items()),
        f"{model['against']} {ratio(model['ratio'])}" if model.get("ratio") else "",
        spread(quartiles[0], quartiles[1]) if quartiles else "",
    )


def stages(document: dict[str, Any]) -> Iterator[str]:
    """Share of a call's time by stage, the largest first."""
    found = document.get("stages", [])
    if not found:
        return
    yield (
        "Time of operators under a profiler, summed by stage; its own cost is in it. One provider "
        "was profiled after the other: compare shares, not times. In *one_hot* dispatch and "
        "combine are products, too."
    )
    yield ""
    rows = [
        (
            profiled["entry"],
            profiled["mode"],
            profiled["provider"],
            duration(profiled["seconds"]),
            _shares(profiled["stages"]),
        )
        for profiled in found
    ]
    columns = ("entry", "mode", "provider", "time", "stages")
    yield from folded("All figures", list(table(columns, rows)))


def _shares(stages: dict[str, float]) -> str:
    """The larger stages; the rest together."""
    total = sum(stages.values())
    if not total:
        return ""
    shares = sorted(((value / total, name) for name, value in stages.items()), reverse=True)
    words = [f"{name} {share(part)}" for part, name in shares if part >= SMALL]
    rest = sum(part for part, _ in shares if part < SMALL)
    return listed([*words, f"{rest:.0%} in small ones"] if rest >= 0.005 else words)
