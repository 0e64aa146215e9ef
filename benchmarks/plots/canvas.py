"""What all pictures share: a figure with a title that names the machine, and its file."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.digest import device_of
from dit_models.atomic import write_bytes
from dit_models.extras import require

DPI = 110
COLOURS = 128
SMALL = 8  # points; nothing is written smaller
TITLE = 10
# Inches for the title and for a panel's own labels.
HEAD, MARGIN = 0.6, 0.6


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches, without pyplot's global state."""
    figure_module = require("matplotlib.figure", extra="bench")
    figure = figure_module.Figure(figsize=(width, height), layout="constrained")
    require("matplotlib.backends.backend_agg", extra="bench").FigureCanvasAgg(figure)
    return figure


def finish(figure: Any, path: Path, title: str, machine: str) -> Path:
    """Put the title on top and write the picture."""
    figure.suptitle(f"{title}\n{machine}", fontsize=TITLE, linespacing=1.4)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    # matplotlib needs Pillow itself. Few colours make the file a third as large.
    image = require("PIL.Image", extra="bench").open(drawn).convert("RGB")
    image.quantize(COLOURS).save(small, format="PNG", optimize=True)
    write_bytes(path, small.getvalue())
    return path


def plain(axes: Any) -> None:
    """Small labels, and only the two lines of the frame that carry them."""
    axes.tick_params(which="both", labelsize=SMALL, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def machine_of(document: dict[str, Any], device: str) -> str:
    """The processor or GPU, threads and PyTorch, in a few words."""
    header = document.get("environment", {})
    torch = f"PyTorch {header['torch']}" if "torch" in header else ""
    if device == "cuda":
        words = [header.get("device", {}).get("gpu", "a CUDA GPU"), torch]
    else:
        model = re.sub(r"\((R|TM)\)|Processor|CPU", "", header.get("cpu", "")) or "a CPU"
        threads = header.get("threads")
        count = f"{threads} thread{'s' if threads != 1 else ''}" if threads else ""
        words = [" ".join(model.split()), count, torch]
    return ", ".join(word for word in words if word)


def name_for(kind: str, device: str) -> str:
    """File name of a picture; those of a GPU end with ``-cuda``."""
    return f"{kind}{'' if device == 'cpu' else f'-{device}'}.png"


def one_for_each_device(
    kind: str,
    rows: list[dict[str, Any]],
    picture: Callable[[Path, list[dict[str, Any]], str], Path],
    folder: Path,
    document: dict[str, Any],
    prefix: str,
) -> list[Path]:
    """A ``picture`` of this kind for each device that there are rows of; the paths."""
    paths = []
    for device in ("cpu", "cuda"):
        found = [row for row in rows if device_of(row) == device]
        if found:
            path = folder / (prefix + name_for(kind, device))
            paths.append(picture(path, found, machine_of(document, device)))
    return paths


def entry_words(result: dict[str, Any]) -> str:
    """What distinguishes an entry inside its group."""
    return str(result["name"].partition("/")[2] or result["name"])
