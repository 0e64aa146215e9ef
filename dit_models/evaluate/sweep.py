"""The quality figure of a run on embedded data: a guidance sweep judged by a small classifier."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import moe_kernels as mk
from dit_models.config import EvaluationConfig
from dit_models.data import build_dataset
from dit_models.drawing import Artist, Prompts, captions_of
from dit_models.evaluate.draw import draw_all
from dit_models.evaluate.scenes import scene_categories, scene_geneval_table
from dit_models.quality import evaluate_digits, evaluate_scenes

# Seeds of judged images, far from those of the sample grids.
FIRST_SEED = 1_000_000

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
        report: called with a line for each scale, and for captions with the table of categories
            at the best one.

    Returns:
        The figures at the scale with the smallest Fréchet distance, plus ``guidance_scale`` and
        ``guidance_sweep`` (the figures at every scale). For ``digit-scenes`` ``geneval`` holds the
        figures by category, see ``scene_geneval``.

    Raises:
        ValueError: for a data set or image size without a classifier.
    """
    if reason := why_not_evaluated(dataset_name, artist.image_shape[-1]):
        raise ValueError(f"samples cannot be judged: {reason}.")
    prompts = balanced_prompts(artist, dataset_name, config.num_samples)
    sweep = []
    for scale in config.guidance_scales:
        images = draw_all(artist, prompts, FIRST_SEED, config.batch_size, guidance_scale=scale)
        figures = {"guidance_scale": scale, **judge_samples(dataset_name, images, prompts)}
        sweep.append(figures)
        report(figures_line(figures))
    best = min(sweep, key=lambda figures: figures["frechet_distance"])
    if "geneval" in best:
        report(scene_geneval_table(best["geneval"]))
    return {**best, "guidance_sweep": sweep}


def balanced_prompts(artist: Artist, dataset_name: str, count: int) -> Prompts:
    """Classes in turn, or the captions of held-out samples."""
    num_classes = artist.model.backbone.config.num_classes
    if num_classes:
        return Prompts(torch.arange(count) % num_classes, None)
    dataset = build_dataset(dataset_name, split="heldout")
    return Prompts(None, captions_of(dataset, count))


def judge_samples(dataset_name: str, images: Tensor, prompts: Prompts) -> dict[str, Any]:
    """The figures of an embedded data set's classifier for images in [-1, 1]."""
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
        "geneval": scene_categories(images, prompts.captions, mk.cache_folder()),
    }


def figures_line(figures: dict[str, Any]) -> str:
    """The figures of one guidance scale in a line."""
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
