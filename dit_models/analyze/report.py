"""The folder of an analysis: figures, their arrays, the page and the summary."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moe_kernels as mk
from dit_models.analyze.collect import Analysis
from dit_models.analyze.figures import FIGURES
from dit_models.analyze.page import page_html
from dit_models.analyze.tables import equal_rows, layer_summary, tables_of
from dit_models.atomic import write_bytes, write_text
from dit_models.drawing import Artist
from dit_models.panels import save_figure
from dit_models.run_folder import LoadedRun

SUMMARY_NAME = "summary.json"
PAGE_NAME = "index.html"


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything, unless it may be overwritten.

    Raises:
        ValueError: when ``out`` is a file, not empty without ``overwrite``, or, with it, a folder
            that holds something else than an analysis.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder.")
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    others = names - _own_names()
    if others:
        raise ValueError(
            f"--out {out} holds other files ({', '.join(sorted(others)[:3])}); choose another."
        )
    if names and not overwrite:
        raise ValueError(f"{out} holds an analysis; choose another --out, or add --overwrite.")


def _own_names() -> set[str]:
    arrays = {f"{stem}.npz" for stem in FIGURES}
    return {f"{stem}.png" for stem in FIGURES} | arrays | {SUMMARY_NAME, PAGE_NAME}


def describe(path: Path, run: LoadedRun, artist: Artist, seed: int) -> dict[str, Any]:
    """What was analyzed, for the summary and the page."""
    sampling = artist.sampling
    return {
        "run": str(path),
        "model": run.config.model,
        "data": run.info.name,
        "training_step": run.step,
        "sampler": sampling.sampler,
        "steps": sampling.num_steps,
        "guidance_scale": sampling.guidance_scale,
        "seed": seed,
        "device": str(artist.device),
        "versions": {"torch": torch.__version__, "moe_kernels": mk.__version__},
    }


def write_report(out: Path, analysis: Analysis, about: dict[str, Any]) -> None:
    """Write every file, each whole or not at all; ``summary.json`` comes last.

    While it is missing the folder is not complete.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / SUMMARY_NAME).unlink(missing_ok=True)
    tables = tables_of(analysis)
    measure = "weight" if equal_rows(analysis.counts) else "rows"
    kind = analysis.subjects.kind
    for stem, draw in FIGURES.items():
        stream = io.BytesIO()
        np.savez_compressed(stream, **tables[stem])  # type: ignore[arg-type]
        write_bytes(out / f"{stem}.npz", stream.getvalue())
        save_figure(draw(tables, kind, measure), out / f"{stem}.png")
    layers, _, experts = tables["class_by_expert"]["rows"].shape
    summary = {
        **about,
        "complete": analysis.complete,
        "images": analysis.counts.num_images,
        "images_by_class": dict(
            zip(
                analysis.subjects.group_names,
                analysis.counts.images_by_group.tolist(),
                strict=True,
            )
        ),
        "tokens_per_image": analysis.counts.tokens,
        "moe_layers": layers,
        "experts": experts,
        "counted": "conditional predictions only",
        "class_and_timestep_figures_show": f"share of {measure}",
        "layers": layer_summary(tables),
    }
    write_text(out / PAGE_NAME, page_html(analysis, tables, about))
    write_text(out / SUMMARY_NAME, json.dumps(summary, indent=2) + "\n")
