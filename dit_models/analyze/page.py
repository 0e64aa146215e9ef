"""The self-contained HTML page: ``page.html`` with the data of one analysis inside."""

import base64
import hashlib
import io
import json
from importlib import resources
from typing import Any

import numpy as np

from dit_models.analyze.collect import NOBODY, Analysis
from dit_models.analyze.tables import Arrays, equal_rows
from dit_models.extras import require
from dit_models.panels import display_pixels

_SHADES = 64  # of the colour scale


def page_html(analysis: Analysis, tables: dict[str, Arrays], about: dict[str, Any]) -> str:
    """The page as text.

    It loads nothing from anywhere, and its content security policy allows only its own script and
    style, by their hashes. Names and captions are data that the script shows as text.
    """
    page = resources.files("dit_models.analyze").joinpath("page.html").read_text(encoding="utf-8")
    data = page_data(analysis, tables, about)
    return (
        page.replace("@STYLE_HASH@", _hash_between(page, "<style>", "</style>"))
        .replace("@SCRIPT_HASH@", _hash_between(page, "<script>", "</script>"))
        .replace("@DATA@", _json_in_html(data))
    )


def page_data(
    analysis: Analysis, tables: dict[str, Arrays], about: dict[str, Any]
) -> dict[str, Any]:
    """What the page shows; maps are base64 of uint8 (uint16 from 255 experts on).

    ``counts``: experts of each token. ``top``: its expert of largest weight, E for none.
    ``entropy``: 0 to 255 for 0 to log E nats, ``None`` where the plans had no logits. All are
    (steps, layers, images, rows, columns).
    """
    maps, load = analysis.maps, tables["timestep_by_expert"]
    coverage, entropy = tables["coverage"], tables["entropy"]
    layers, experts = load["rows"].shape[1:]
    number = np.uint8 if experts < 255 else np.uint16
    top = np.where(maps.top_expert == NOBODY, experts, maps.top_expert)
    maximum = float(entropy["maximum"])
    quantised = np.round(np.clip(maps.entropy / max(maximum, 1e-9), 0, 1) * 255)
    known = bool(np.isfinite(maps.entropy).all())
    shown = maps.steps
    return {
        "about": about,
        "images_counted": analysis.counts.num_images,
        "complete": analysis.complete,
        "grid": list(analysis.grid),
        "layers": layers,
        "experts": experts,
        "steps": [step + 1 for step in shown],
        "noise": [round(analysis.noise_levels[step], 4) for step in shown],
        "images": [
            {"title": title, "picture": picture}
            for title, picture in zip(analysis.titles, _pictures(analysis), strict=True)
        ],
        # In token choice every token has as many experts: that map would be one colour.
        "first_map": "top" if np.ptp(maps.experts_per_token) == 0 else "counts",
        "bytes": np.dtype(number).itemsize,
        "counts": _base64(maps.experts_per_token.astype(number)),
        "largest_count": max(1, int(maps.experts_per_token.max())),
        "top": _base64(top.astype(number)),
        "entropy": _base64(quantised.astype(np.uint8)) if known else None,
        "largest_entropy": round(maximum, 4),
        "load": {
            "rows": _rounded(load["rows_share"][shown]),
            "weight": _rounded(load["weight_share"][shown]),
        },
        "measure": "weight" if equal_rows(analysis.counts) else "rows",
        "mean_entropy": _rounded(entropy["entropy"][shown]) if known else None,
        "unrouted": _rounded(coverage["unrouted_share"][shown]),
        "most": np.round(coverage["most_experts_share"][shown] * experts).astype(int).tolist(),
        "scale": _colors("inferno", np.linspace(0, 1, _SHADES)),
        "expert_colors": _expert_colors(experts),
    }


def _pictures(analysis: Analysis) -> list[str]:
    """The images as PNG in data URIs."""
    image_module = require("PIL.Image", extra="train")
    pictures = []
    for pixels in display_pixels(analysis.images):
        stream = io.BytesIO()
        image_module.fromarray(pixels).save(stream, format="PNG")
        pictures.append("data:image/png;base64," + base64.b64encode(stream.getvalue()).decode())
    return pictures


def _base64(values: np.ndarray) -> str:
    little = values.astype(values.dtype.newbyteorder("<"))
    return base64.b64encode(np.ascontiguousarray(little).tobytes()).decode()


def _rounded(values: np.ndarray) -> list[Any]:
    return np.round(np.nan_to_num(values), 5).tolist()


def _colors(name: str, where: np.ndarray) -> list[str]:
    colors = require("matplotlib", extra="train").colormaps[name](where)
    return ["#" + "".join(f"{round(255 * part):02x}" for part in color[:3]) for color in colors]


def _expert_colors(experts: int) -> list[str]:
    if experts <= 10:
        return _colors("tab10", np.arange(experts))
    if experts <= 20:
        return _colors("tab20", np.arange(experts))
    return _colors("hsv", np.arange(experts) / experts)


def _json_in_html(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in, whatever its strings are."""
    text = json.dumps(data, separators=(",", ":"))  # ASCII only
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash_between(page: str, start: str, end: str) -> str:
    """The content security policy's name of what stands between two tags."""
    content = page.partition(start)[2].partition(end)[0]
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
