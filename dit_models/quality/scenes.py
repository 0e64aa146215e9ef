"""Quality of generated digit scenes: do they show what their captions ask for?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_models.data.base import SPLITS
from dit_models.data.scenes import Scene, SceneDataset, parse_caption
from dit_models.quality.frechet import frechet_distance
from dit_models.quality.reader import (
    SCENE_IMAGE_SIZE,
    ReaderAccuracy,
    ReaderSettings,
    read_scenes,
    scene_reader,
)
from dit_models.quality.trained import check_images, in_chunks

_REFERENCE_SCENES = 2000
_REAL_SEED = 0


@dataclass(frozen=True)
class SceneVerdict:
    """What is right about one scene; None where the caption did not ask for it.

    Attributes:
        digit: all asked digits are there, wherever.
        color: all asked digits are there in their colours, wherever.
        position: two objects: the asked digits are on the asked sides.
        both_objects: two objects: digits, colours and sides are all right.
        overall: digits, colours, sides and the number of objects are all right.
    """

    digit: bool
    color: bool
    position: bool | None
    both_objects: bool | None
    overall: bool


@dataclass(frozen=True)
class SceneQuality:
    """How well generated scenes follow their captions: a small GenEval-like check, not GenEval.

    A reader network judges. Perfect scenes in a new hand score about ``reader_accuracy.scene``
    (0.965), and perfect ones in the hands it was trained on about 0.995, so take differences of
    less than a few hundredths above 0.95 for nothing. It forgives blur and noise, which the
    Fréchet distance sees.

    Attributes:
        digit_accuracy, color_accuracy, overall: fractions of all scenes, as in ``SceneVerdict``.
        position_accuracy, both_objects_accuracy: fractions of the scenes whose captions ask for two
            objects; None where none did.
        frechet_distance: generated scenes to real ones of the same captions, drawn with held-out
            scans; lower is better. Not FID.
        frechet_floor: the same for as many real scenes of these captions, drawn with the training
            half's scans: what a perfect sampler would be near.
        reader_accuracy: the reader's own accuracy on real scenes of held-out scans.
        num_samples: how many scenes were judged.
    """

    digit_accuracy: float
    color_accuracy: float
    position_accuracy: float | None
    both_objects_accuracy: float | None
    overall: float
    frechet_distance: float
    frechet_floor: float
    reader_accuracy: ReaderAccuracy
    num_samples: int


@torch.no_grad()
def evaluate_scenes(
    images: Tensor,
    captions: Sequence[str],
    cache_dir: str | Path | None = None,
    seed: int = 0,
    settings: ReaderSettings | None = None,
) -> SceneQuality:
    """Judge generated scenes with a small network trained on real ones.

    The Fréchet distance is biased upwards for few samples, as is its floor; take at least some
    hundreds.

    Args:
        images: (n, 3, 32, 32) float in [-1, 1], on any device.
        captions: n captions that ``parse_caption`` understands.
        cache_dir: folder that keeps the trained reader; None trains it anew (minutes).
        seed: of the reader.
        settings: of the reader's training; None is its default.

    Raises:
        ValueError: wrong shapes, a caption of another form, fewer than 2 images, NaN or infinity.
    """
    images = check_images(images, (3, SCENE_IMAGE_SIZE, SCENE_IMAGE_SIZE))
    if len(captions) != len(images):
        raise ValueError(f"there are {len(captions)} captions for {len(images)} images")
    asked = [parse_caption(caption) for caption in captions]
    reader, reader_accuracy = scene_reader(cache_dir, seed, settings)
    features = in_chunks(reader.features, images)
    shown = read_scenes(reader.heads(features))
    verdicts = [judge(*pair) for pair in zip(asked, shown, strict=True)]
    reference = in_chunks(reader.features, real_scenes("heldout", asked, _REFERENCE_SCENES))
    floor = in_chunks(reader.features, real_scenes("train", asked, len(images)))
    return SceneQuality(
        digit_accuracy=_fraction([verdict.digit for verdict in verdicts]),
        color_accuracy=_fraction([verdict.color for verdict in verdicts]),
        position_accuracy=_fraction_asked([verdict.position for verdict in verdicts]),
        both_objects_accuracy=_fraction_asked([verdict.both_objects for verdict in verdicts]),
        overall=_fraction([verdict.overall for verdict in verdicts]),
        frechet_distance=frechet_distance(features, reference),
        frechet_floor=frechet_distance(floor, reference),
        reader_accuracy=reader_accuracy,
        num_samples=len(images),
    )


def judge(asked: Scene, shown: Scene) -> SceneVerdict:
    """Compare what a caption asks for with what an image shows; grounds do not matter."""
    asked_digits = [item.digit for item in asked.placed]
    shown_digits = [item.digit for item in shown.placed]
    digit = Counter(asked_digits) <= Counter(shown_digits)
    color = Counter(asked.placed) <= Counter(shown.placed)
    same_layout = shown.layout == asked.layout
    overall = same_layout and shown.placed == asked.placed
    if asked.relation is None:
        return SceneVerdict(digit, color, None, None, overall)
    position = same_layout and shown_digits == asked_digits
    return SceneVerdict(digit, color, position, overall, overall)


def real_scenes(split: str, asked: Sequence[Scene], at_least: int) -> Tensor:
    """Real images of what was asked for, each scene as often, until there are ``at_least``."""
    data = SceneDataset(split, SCENE_IMAGE_SIZE)
    # A stream for each split: grounds and positions shared by both would lower the floor.
    rng = np.random.default_rng([_REAL_SEED, SPLITS.index(split)])
    repeats = -(-at_least // len(asked))
    return torch.stack([data.draw(scene, rng) for _ in range(repeats) for scene in asked])


def _fraction(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts)


def _fraction_asked(verdicts: Sequence[bool | None]) -> float | None:
    """Fraction of those that were asked for; None where none was."""
    given = [verdict for verdict in verdicts if verdict is not None]
    return _fraction(given) if given else None
