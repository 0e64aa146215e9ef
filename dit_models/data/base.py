"""What a data set is here: an indexable source of images with labels, captions or neither."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

SPLITS = ("train", "heldout", "all")


@dataclass(frozen=True)
class DatasetInfo:
    """What a model and a loader need to know about a data set.

    Attributes:
        name: name of the data set, kept in loader states.
        image_size: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        num_classes: number of labels, 0 if there are none.
        has_captions: whether samples carry a caption.
    """

    name: str
    image_size: int
    channels: int
    num_classes: int
    has_captions: bool


class Sample(NamedTuple):
    """One image: (C, height, width) float32 in [-1, 1], label (-1: none), caption ("": none)."""

    image: Tensor
    label: int
    caption: str


class Batch(NamedTuple):
    """Stacked samples.

    Attributes:
        images: (B, C, height, width) float32 in [-1, 1].
        labels: (B,) int64, or None where the data set has no labels.
        captions: B strings, or None where the data set has no captions.
    """

    images: Tensor
    labels: Tensor | None
    captions: list[str] | None


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
