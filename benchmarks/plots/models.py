"""Images a second of whole models, each model's fastest as the longest bar."""

from pathlib import Path
from typing import Any

from benchmarks.plots import bars
from benchmarks.plots.canvas import (
    HEAD,
    MARGIN,
    finish,
    new_figure,
    one_for_each_device,
)


def draw(folder: Path, document: dict[str, Any], prefix: str) -> list[Path]:
    """Write ``models`` for each device that whole models ran on."""
    rows = [model for model in document.get("models", []) if model.get("images_per_second")]
    return one_for_each_device("models", rows, _picture, folder, document, prefix)


def _picture(path: Path, models: list[dict[str, Any]], machine: str) -> Path:
    blocks = [
        bars.Block(f"{model['name']}, batch {model['batch_size']}", {"images": _bars(model)})
        for model in models
    ]
    figure = new_figure(7.0, max(bars.height_of(blocks) + MARGIN + HEAD, 2.0))
    axes = figure.subplots(1, 1)
    bars.draw_labels(axes, blocks)
    bars.draw_bars(axes, blocks, "images", 0.0)
    axes.set_xlim(0, 1.25)
    axes.set_xticks([0, 0.5, 1], ["0", "half as fast", "fastest"])
    return finish(figure, path, "Whole models: images a second (longer is faster)", machine)


def _bars(model: dict[str, Any]) -> list[bars.Bar]:
    rates = model["images_per_second"]
    fastest = max(rates.values())
    return [bars.Bar(name, rate / fastest, f"{rate:.3g}") for name, rate in rates.items()]
