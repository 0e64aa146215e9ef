"""The quality figure of a run on embedded data: a guidance sweep judged by a small classifier.

``python -m dit_models.evaluate RUN_DIR`` repeats it for a finished run.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe_kernels as mk
from dit_models.config import EvaluationConfig
from dit_models.data import build_dataset
from dit_models.drawing import Artist, Prompts, captions_of
from dit_models.quality import evaluate_digits, evaluate_scenes

# Seeds of judged images, far from those of the sample grids.
_FIRST_SEED = 1_000_000


# Side of the images that each data set's classifier reads.
_JUDGED_SIZES = {"digits": 16, "digit-scenes": 32}


def why_not_evaluated(dataset_name: str, image_size: int) -> str | None:
    """Why no classifier judges images of this data set and size; ``None`` when one does."""
    if dataset_name not in _JUDGED_SIZES:
        return f"{dataset_name} has no classifier (only {', '.join(_JUDGED_SIZES)} have)"
    if image_size != _JUDGED_SIZES[dataset_name]:
        expected = _JUDGED_SIZES[dataset_name]
        return (
            f"the classifier of {dataset_name} reads images of {expected} pixels, not {image_size}"
        )
    return None


def evaluate(
    artist: Artist,
    dataset_name: str,
    config: EvaluationConfig,
    *,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Draw ``num_samples`` images at each guidance scale and judge them.

    Args:
        artist: the model to draw from.
        dataset_name: an embedded data set.
        config: samples, guidance scales, batch size.
        report: called with a line for each scale.

    Returns:
        The figures at the scale with the smallest Fréchet distance, plus ``guidance_scale`` and
        ``guidance_sweep`` (the figures at every scale).

    Raises:
        ValueError: for a data set or image size without a classifier.
    """
    if reason := why_not_evaluated(dataset_name, artist.image_shape[-1]):
        raise ValueError(f"samples cannot be judged: {reason}.")
    prompts = _balanced_prompts(artist, dataset_name, config.num_samples)
    sweep = []
    for scale in config.guidance_scales:
        images = _draw_all(artist, prompts, scale, config.batch_size)
        figures = {"guidance_scale": scale, **_judge(dataset_name, images, prompts)}
        sweep.append(figures)
        report(_line(figures))
    best = min(sweep, key=lambda figures: figures["frechet_distance"])
    return {**best, "guidance_sweep": sweep}


def _balanced_prompts(artist: Artist, dataset_name: str, count: int) -> Prompts:
    num_classes = artist.model.backbone.config.num_classes
    if num_classes:
        return Prompts(torch.arange(count) % num_classes, None)
    dataset = build_dataset(dataset_name, split="heldout")
    return Prompts(None, captions_of(dataset, count))


def _draw_all(artist: Artist, prompts: Prompts, scale: float, batch_size: int) -> Tensor:
    batches = []
    for start in range(0, len(prompts), batch_size):
        part = prompts.part(start, start + batch_size)
        seeds = list(range(_FIRST_SEED + start, _FIRST_SEED + start + len(part)))
        batches.append(artist.draw(part, seeds, guidance_scale=scale))
    return torch.cat(batches)


def _judge(dataset_name: str, images: Tensor, prompts: Prompts) -> dict[str, Any]:
    if dataset_name == "digits":
        assert prompts.labels is not None
        return asdict(evaluate_digits(images, prompts.labels, mk.cache_folder()))
    assert prompts.captions is not None
    quality = asdict(evaluate_scenes(images, prompts.captions, mk.cache_folder()))
    # The names every summary has: the asked scene is its class, the reader its classifier.
    return {
        "class_accuracy": quality["overall"],
        "classifier_accuracy": quality["reader_accuracy"]["scene"],
        **quality,
    }


def _line(figures: dict[str, Any]) -> str:
    text = (
        f"  guidance {figures['guidance_scale']:<5g} accuracy {figures['class_accuracy']:.3f}  "
        f"Fréchet distance {figures['frechet_distance']:.2f} (floor {figures['frechet_floor']:.2f})"
    )
    if "both_objects_accuracy" in figures:
        parts = ("digit", "color", "position", "both_objects")
        text += "  " + "  ".join(
            f"{part} {figures[f'{part}_accuracy']:.3f}"
            for part in parts
            if figures[f"{part}_accuracy"] is not None
        )
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a run again and print the figures."""
    from dit_models.run_folder import load_run
    from dit_models.train import run_command

    parser = argparse.ArgumentParser(prog="python -m dit_models.evaluate", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a run, e.g. runs/digits")
    parser.add_argument("--samples", type=int, help="images for each guidance scale")
    parser.add_argument("--guidance", type=float, nargs="+", help="guidance scales to try")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    options = parser.parse_args(arguments)

    def run() -> None:
        loaded = load_run(options.run_dir, options.device)
        config = loaded.config.evaluation
        config.num_samples = options.samples or config.num_samples
        config.guidance_scales = options.guidance or config.guidance_scales
        figures = evaluate(loaded.artist, loaded.config.data.name, config)
        print(f"best: {_line(figures).strip()}")

    run_command(run)


if __name__ == "__main__":
    main()
