"""Quality of generated digits."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dit_models.data.base import stratified_order
from dit_models.data.digits import NUM_DIGITS, DigitDataset
from dit_models.quality.classifier import DIGIT_IMAGE_SIZE, digit_classifier
from dit_models.quality.frechet import frechet_distance
from dit_models.quality.trained import check_images, in_chunks

_FLOOR_SEED = 0


@dataclass(frozen=True)
class DigitQuality:
    """How good generated digits are; figures of one classifier seed compare with each other only.

    Attributes:
        class_accuracy: fraction that the classifier reads as the digit asked for; higher is better.
        frechet_distance: generated digits to the real held-out half; lower is better. Not FID.
        frechet_floor: the same for as many real digits of the training half (all of it, if more
            were generated): what a perfect sampler would be near.
        classifier_accuracy: the classifier's own accuracy on the held-out half (0.99): what perfect
            digits in a new hand score. Copies of the training half score 1.
        num_samples: how many digits were judged.
    """

    class_accuracy: float
    frechet_distance: float
    frechet_floor: float
    classifier_accuracy: float
    num_samples: int


@torch.no_grad()
def evaluate_digits(
    images: Tensor, labels: Tensor, cache_dir: str | Path | None = None, seed: int = 0
) -> DigitQuality:
    """Judge generated digits with a small classifier trained on the real training half.

    Ask for every digit equally often: the distance also sees a skew of classes. It is biased
    upwards for few samples, as is its floor; take at least some hundreds.

    Args:
        images: (n, 1, 16, 16) float in [-1, 1], on any device.
        labels: (n,) integers 0..9, the digits that were asked for.
        cache_dir: folder that keeps the trained classifier; None trains it anew (seconds).
        seed: of the classifier.

    Raises:
        ValueError: wrong shapes, labels out of range, fewer than 2 images, NaN or infinity.
    """
    images = check_images(images, (1, DIGIT_IMAGE_SIZE, DIGIT_IMAGE_SIZE))
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected ({len(images)},), one per image"
        )
    if labels.is_floating_point() or not bool(((labels >= 0) & (labels < NUM_DIGITS)).all()):
        raise ValueError(f"labels must be integers 0..{NUM_DIGITS - 1}; got {labels.unique()}")
    classifier, classifier_accuracy = digit_classifier(cache_dir, seed)
    training, heldout = (DigitDataset(split, DIGIT_IMAGE_SIZE) for split in ("train", "heldout"))
    features = in_chunks(classifier.features, images)
    reference = classifier.features(heldout.images)
    chosen = stratified_subset(training.labels.tolist(), len(images), _FLOOR_SEED)
    predicted = classifier.head(features).argmax(1)
    return DigitQuality(
        class_accuracy=float((predicted == labels.cpu()).double().mean()),
        frechet_distance=frechet_distance(features, reference),
        frechet_floor=frechet_distance(classifier.features(training.images[chosen]), reference),
        classifier_accuracy=classifier_accuracy,
        num_samples=len(images),
    )


def stratified_subset(labels: list[int], count: int, seed: int) -> list[int]:
    """Up to ``count`` indices, the same for each class to within one, fixed by ``seed``."""
    columns = stratified_order(labels, seed)
    longest = max(len(column) for column in columns)
    in_turn = [column[i] for i in range(longest) for column in columns if i < len(column)]
    return in_turn[:count]
