"""Handwritten digits: the 1,797 scans of 8x8 pixels that scikit-learn carries."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dit_models.data.base import DatasetInfo, Sample, check_index, split_indices
from dit_models.extras import require

NUM_DIGITS = 10
SCAN_SIZE = 8
_SCAN_MAX = 16.0  # the scans hold integers 0..16


def load_scans(split: str) -> tuple[Tensor, Tensor]:
    """Scans of one half of the digits.

    Args:
        split: "train", "heldout" (fixed halves, stratified by class) or "all".

    Returns:
        scans (n, 8, 8) float32 in [0, 1] (1 is ink) and labels (n,) int64.

    Raises:
        ValueError: unknown ``split``.
    """
    digits = require("sklearn.datasets", extra="train").load_digits()
    chosen = split_indices(digits.target.tolist(), split)
    scans = torch.from_numpy(digits.images[chosen].astype(np.float32) / _SCAN_MAX)
    return scans, torch.from_numpy(digits.target[chosen].astype(np.int64))


def resize_scans(scans: Tensor, size: int) -> Tensor:
    """Bicubic resize of (n, 8, 8) scans to (n, size, size), clamped to [0, 1].

    The clamp takes away what bicubic interpolation overshoots next to a sharp edge.
    """
    resized = interpolate(scans[:, None], size=(size, size), mode="bicubic", align_corners=False)
    return resized[:, 0].clamp(0.0, 1.0)


class DigitDataset:
    """Digits as grey images with ten classes.

    Args:
        split: "train", "heldout" or "all".
        image_size: height and width; the scans of 8x8 are resized to it.

    Attributes:
        images: (n, 1, image_size, image_size) float32 in [-1, 1].
        labels: (n,) int64.

    Raises:
        ValueError: unknown split, or ``image_size`` below 8.
    """

    def __init__(self, split: str = "train", image_size: int = 16) -> None:
        if image_size < SCAN_SIZE:
            raise ValueError(
                f"image_size is {image_size}; digits need at least {SCAN_SIZE}, the size of a scan"
            )
        scans, self.labels = load_scans(split)
        self.images = resize_scans(scans, image_size)[:, None] * 2.0 - 1.0
        self.info = DatasetInfo("digits", image_size, 1, NUM_DIGITS, has_captions=False)

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Digit ``index``; nothing about it is random."""
        check_index(index, len(self))
        return Sample(self.images[index], int(self.labels[index]), "")
