"""The figures of a file of samples: Inception figures, CLIP score, those of our classifiers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_models.atomic import sha256_of
from dit_models.drawing import Prompts
from dit_models.evaluate.adm import NpzImages
from dit_models.evaluate.clip_score import clip_score
from dit_models.evaluate.draw import from_pixels
from dit_models.evaluate.inception import (
    NEIGHBOURS,
    SPLIT_SIZE,
    Inception,
    InceptionFeatures,
    fidelity_module,
    inception_score,
    precision_recall,
)
from dit_models.evaluate.reference import Reference
from dit_models.evaluate.sweep import judge_samples
from dit_models.extras import require
from dit_models.model_folder import identity_of
from dit_models.quality.frechet import Moments, frechet_of_moments, moments

Progress = Callable[[str, int], Callable[[int], None]]


def inception_figures(
    samples: NpzImages,
    weights: Path,
    reference: Path | None,
    *,
    device: torch.device | str,
    batch_size: int,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inception score, and with a reference FID, sFID, precision and recall.

    The distances are ``quality.frechet_distance``'s, which equal torch-fidelity's to rounding and
    stay exact where there are fewer images than features.

    Args:
        samples: generated images.
        weights: Inception weights.
        reference: see ``Reference``; None leaves all but the inception score out.
        device: where the network runs.
        batch_size: images a call of the network.
        progress: ``progress(what, count)`` returns a function that is told of finished images.

    Returns:
        The settings and the figures. Precision and recall need the reference's images; its moments
        are used as they are where they are given, as in ADM's evaluator.

    Raises:
        ValueError: fewer than 2 samples, or a wrong file.
        ImportError: torch-fidelity or its torchvision is missing.
    """
    if len(samples) < 2:
        raise ValueError(f"{samples.path} holds {len(samples)} image; expected at least 2.")
    real = None if reference is None else Reference(reference, samples.size)
    network = Inception(weights, device)
    ours = network.features_of(samples, batch_size, progress("samples", len(samples)))
    splits = max(1, len(samples) // SPLIT_SIZE)
    settings: dict[str, Any] = {
        "inception_sha256": sha256_of(weights),
        "torch_fidelity": fidelity_module("torch_fidelity").__version__,
        "inception_score_splits": splits,
    }
    figures: dict[str, Any] = inception_score(ours.logits, splits)
    if real is not None:
        theirs: InceptionFeatures | None = None
        if real.images is not None:
            theirs = network.features_of(
                real.images, batch_size, progress("reference", len(real.images))
            )
        settings["reference"] = real.path.name
        settings["reference_sha256"] = real.identity()
        settings["reference_images"] = 0 if real.images is None else len(real.images)
        settings["reference_moments"] = "given" if real.pool is not None else "of its images"
        figures["fid"] = _distance(ours.pool, real.pool, theirs and theirs.pool)
        figures["sfid"] = _distance(ours.spatial, real.spatial, theirs and theirs.spatial)
        if theirs is not None:
            settings["precision_recall_neighbours"] = NEIGHBOURS
            figures.update(precision_recall(ours.pool, theirs.pool))
    return settings, {name: value for name, value in figures.items() if value is not None}


def _distance(features: Tensor, given: Moments | None, real: Tensor | None) -> float | None:
    if given is None and real is None:
        return None
    target = given if given is not None else moments(real)  # type: ignore[arg-type]
    return frechet_of_moments(moments(features), target)


def clip_figures(
    samples: NpzImages,
    captions: list[str] | None,
    path: Path,
    *,
    device: torch.device | str,
    batch_size: int,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The CLIP score, see ``clip_score``.

    Returns:
        The settings and the figures.

    Raises:
        ValueError: images without captions, or no CLIP model there.
    """
    if captions is None:
        raise ValueError(
            "--clip: a CLIP score needs the captions of these images: give --prompts FILE."
        )
    score = clip_score(
        samples, captions, path, device=device, batch_size=batch_size,
        progress=progress("CLIP", len(samples)),
    )  # fmt: skip
    settings = {
        "clip": path.name,
        "clip_sha256": identity_of(path),
        "transformers": require("transformers", extra="eval").__version__,
    }
    return settings, {"clip_score": score}


def classifier_figures(
    samples: NpzImages, prompts: Prompts, dataset_name: str, channels: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of an embedded data set's classifier, see ``quality``.

    Returns:
        The settings and the figures.
    """
    pixels = next(samples.batches(len(samples)))  # 32 x 32 pixels at most
    return {"data": dataset_name}, judge_samples(
        dataset_name, from_pixels(pixels, channels), prompts
    )
