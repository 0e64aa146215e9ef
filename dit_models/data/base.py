"""What a data set is here: an indexable source of images with labels, captions or neither."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "heldout", "all")


@dataclass(frozen=True)
class DatasetInfo:
    """What a model and a loader need to know about a data set.

    Attributes:
        name: name of the data set, kept in loader states.
        image_size: height and width in pixels (of latents, where these are the images).
        channels: 1 (grey) or 3 (RGB), or those of the latents.
        num_classes: number of labels, 0 if there are none.
        has_captions: whether samples carry a caption.
        vae: fields of the ``VAEInfo`` that images are latents of; None for pixels.
        text: fields of the ``EncoderSpec`` that captions are already encoded with, if they are.
    """

    name: str
    image_size: int
    channels: int
    num_classes: int
    has_captions: bool
    vae: dict[str, Any] | None = None
    text: dict[str, Any] | None = None


class Sample(NamedTuple):
    """One image with its conditions.

    Attributes:
        image: (C, height, width) float32, pixels in [-1, 1] or latents.
        label: class, -1 where there is none.
        caption: "" where there is none.
        text: (n, dim) features of the caption's n tokens, where it is already encoded.
    """

    image: Tensor
    label: int
    caption: str
    text: Tensor | None = None


class Batch(NamedTuple):
    """Stacked samples.

    Attributes:
        images: (B, C, height, width) float32, pixels in [-1, 1] or latents.
        labels: (B,) int64, or None where the data set has no labels.
        captions: B strings, or None where the data set has no captions.
        text: (B, max_length, dim) features of encoded captions, zeros at padding, or None.
        text_mask: (B, max_length) bool, True = a token, or None.
    """

    images: Tensor
    labels: Tensor | None
    captions: list[str] | None
    text: Tensor | None = None
    text_mask: Tensor | None = None


def pad_rows(rows: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Rows (n_i, dim) with n_i <= ``length`` as (B, length, dim) with zeros, and the mask."""
    padded = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(length) < lengths[:, None]
    return padded, mask.to(padded.device)


class ImageDataset(Protocol):
    """A finite data set whose samples depend on ``index`` and ``rng`` alone."""

    @property
    def info(self) -> DatasetInfo: ...

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Sample ``index``; what is random about it (flip, jitter) is drawn from ``rng``."""
        ...


def check_split(split: str) -> None:
    """Raise ValueError unless ``split`` is one of ``SPLITS``."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")


def check_index(index: int, length: int) -> None:
    """Raise IndexError unless ``0 <= index < length``."""
    if not 0 <= index < length:
        raise IndexError(f"index {index} is outside a data set of {length} samples")


def stratified_order(labels: Sequence[int], seed: int) -> list[list[int]]:
    """Indices of each class, class 0 first, each class in a fixed shuffled order.

    The order is that of a hash of (seed, index), so it can never change with a library's version.
    """

    def shuffle_key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=16).digest()

    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_class[int(label)].append(index)
    return [sorted(by_class[label], key=shuffle_key) for label in sorted(by_class)]


def split_indices(labels: Sequence[int], split: str, seed: int = 0) -> list[int]:
    """Indices of a fixed half/half split, stratified by class, in ascending order.

    Args:
        labels: class of each sample.
        split: "train" (the larger half where a class is odd), "heldout" or "all".
        seed: which split; one seed gives disjoint halves that together are everything.

    Raises:
        ValueError: unknown ``split``.
    """
    check_split(split)
    if split == "all":
        return list(range(len(labels)))
    chosen: list[int] = []
    for indices in stratified_order(labels, seed):
        middle = (len(indices) + 1) // 2
        chosen += indices[:middle] if split == "train" else indices[middle:]
    return sorted(chosen)
