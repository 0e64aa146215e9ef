"""Quality against activated compute, a line an arm, error bars over seeds."""

import io
from pathlib import Path

from dit_models.ablation.results import Point
from dit_models.atomic import write_bytes
from dit_models.extras import require

_PANELS = (
    ("heldout_loss", "diffusion loss on held-out scenes (lower is better)"),
    ("frechet", "Fréchet distance, not FID (lower is better)"),
    ("overall", "scenes entirely as asked (higher is better)"),
)


def save_plot(path: Path, found: list[Point], title: str) -> None:
    """Write the plot as PNG."""
    # Figure and canvas by hand: pyplot would keep global state and look for a display.
    figure_module = require("matplotlib.figure", extra="train")
    figure = figure_module.Figure(figsize=(5.0 * len(_PANELS), 4.4), layout="constrained")
    require("matplotlib.backends.backend_agg", extra="train").FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(_PANELS), squeeze=False)
    labels = list(dict.fromkeys(point.label for point in found))
    for axis, (name, description) in zip(axes.flat, _PANELS, strict=True):
        for label in labels:
            mine = [point for point in found if point.label == label]
            axis.errorbar(
                [point.macs / 1e6 for point in mine],
                [point.values[name][0] for point in mine],
                [point.values[name][1] for point in mine],
                label=label, marker="o", markersize=4, capsize=3, linewidth=1.2,
            )  # fmt: skip
        axis.set(xlabel="activated MMACs an image", title=description)
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    write_bytes(path, stream.getvalue())
