"""Figures of the finished runs, as JSON and as a table with means and spreads over seeds."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_models.atomic import write_text

RESULT_NAME = "ablation.json"


@dataclass(frozen=True)
class RunResult:
    """One trained model.

    Attributes:
        arm, label: what was trained.
        width: hidden size D.
        seed: of weights, data order and noise.
        steps, batch_size: of the training.
        macs: activated multiply-accumulates of one image.
        parameters, activated: of the backbone.
        heldout_loss: see ``heldout.heldout_loss``; lower is better.
        overall, digit, color: shares of generated scenes that follow the caption.
        position: the same for the sides of two objects.
        frechet: Fréchet distance of the reader's features; lower is better. Not FID.
        guidance_scale: of the generated scenes.
        num_samples: generated scenes.
        train_seconds: time of the steps.
    """

    arm: str
    label: str
    width: int
    seed: int
    steps: int
    batch_size: int
    macs: int
    parameters: int
    activated: int
    heldout_loss: float
    overall: float
    digit: float
    color: float
    position: float | None
    frechet: float
    guidance_scale: float
    num_samples: int
    train_seconds: float


def save_result(run_dir: Path, result: RunResult) -> None:
    """Keep the figures of a run beside it."""
    write_text(run_dir / RESULT_NAME, json.dumps(asdict(result), indent=2) + "\n")


def load_results(folder: Path) -> list[RunResult]:
    """The figures of every finished run inside ``folder``, by arm, width and seed.

    Raises:
        ValueError: a damaged file, by its name.
    """
    results = []
    for path in sorted(folder.glob(f"*/{RESULT_NAME}")):
        try:
            results.append(RunResult(**json.loads(path.read_text())))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it to judge again.") from error
    return results


@dataclass(frozen=True)
class Point:
    """An arm at one width: mean and sample standard deviation over its seeds."""

    label: str
    width: int
    macs: int
    seeds: int
    values: dict[str, tuple[float, float]]


FIGURES = ("heldout_loss", "frechet", "overall", "digit", "color")


def points(results: list[RunResult], order: list[str]) -> list[Point]:
    """Results averaged over seeds, in the order of the labels and then of the widths."""
    grouped: dict[tuple[str, int], list[RunResult]] = {}
    for result in results:
        grouped.setdefault((result.label, result.width), []).append(result)
    keys = sorted(grouped, key=lambda key: (order.index(key[0]), key[1]))
    return [_point(*key, grouped[key]) for key in keys]


def _point(label: str, width: int, results: list[RunResult]) -> Point:
    values = {}
    for name in FIGURES:
        numbers = [getattr(result, name) for result in results]
        spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        values[name] = (statistics.fmean(numbers), spread)
    return Point(label, width, results[0].macs, len(results), values)


def table(found: list[Point]) -> str:
    """A Markdown table, a line for each arm and width."""
    heads = ["", "width", "MMACs", "seeds", *(name.replace("_", " ") for name in FIGURES)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for point in found:
        cells: list[Any] = [point.label, point.width, f"{point.macs / 1e6:.1f}", point.seeds]
        for name in FIGURES:
            mean, spread = point.values[name]
            digits = 1 if name == "frechet" else 4 if name == "heldout_loss" else 3
            text = f"{mean:.{digits}f}"
            cells.append(text + (f" ± {spread:.{digits}f}" if point.seeds > 1 else ""))
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)
