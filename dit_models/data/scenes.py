"""Captioned scenes of one or two coloured digits, with the truth behind each caption."""

import re
from dataclasses import dataclass, replace

import numpy as np
import torch

from dit_models.data.base import SPLITS, DatasetInfo, Sample, check_index, check_split
from dit_models.data.digits import NUM_DIGITS, load_scans, resize_scans

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# RGB in [0, 1]. Ink colours are far apart from each other and brighter than every ground.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.15, 0.10),
    "green": (0.10, 0.80, 0.20),
    "blue": (0.20, 0.50, 1.00),
    "yellow": (1.00, 0.90, 0.10),
    "white": (1.00, 1.00, 1.00),
    "magenta": (1.00, 0.25, 0.95),
}
# A nuisance factor: a caption never names the ground.
GROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.04, 0.04, 0.05),
    "navy": (0.06, 0.08, 0.24),
    "brown": (0.24, 0.14, 0.08),
    "forest": (0.06, 0.20, 0.12),
    "slate": (0.26, 0.28, 0.30),
}
RELATIONS = ("left of", "right of", "above", "below")
LAYOUTS = ("single", "horizontal", "vertical")
SINGLE_FRACTION = 0.25
DEFAULT_LENGTH = 20_000
# Keeps the streams behind the scenes apart from any that a caller seeds for the jitter.
_CONTENT_STREAM = 0x5CE4E5

_OBJECT = rf"a ({'|'.join(COLORS)}) ({'|'.join(DIGIT_NAMES)})"
_CAPTION = re.compile(rf"{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})?")


@dataclass(frozen=True)
class SceneObject:
    """One digit: ``digit`` 0..9 and ``color``, a key of ``COLORS``."""

    digit: int
    color: str

    def __post_init__(self) -> None:
        if not 0 <= self.digit < NUM_DIGITS:
            raise ValueError(f"digit is {self.digit}; expected 0..{NUM_DIGITS - 1}")
        if self.color not in COLORS:
            raise ValueError(f"color is {self.color!r}; expected one of {', '.join(COLORS)}")

    @property
    def phrase(self) -> str:
        return f"a {self.color} {DIGIT_NAMES[self.digit]}"


@dataclass(frozen=True)
class Scene:
    """What a scene shows.

    Attributes:
        objects: one or two objects, in the order the caption names them.
        relation: where the first object is as seen from the second; None for one object.
        ground: key of ``GROUNDS``; None where it is unknown, as after ``parse_caption``.

    Raises:
        ValueError: objects and relation do not fit, or an unknown relation or ground.
    """

    objects: tuple[SceneObject, ...]
    relation: str | None = None
    ground: str | None = None

    def __post_init__(self) -> None:
        expected = 1 if self.relation is None else 2
        if len(self.objects) != expected:
            raise ValueError(
                f"a scene with relation {self.relation!r} has {expected} object(s); "
                f"got {len(self.objects)}"
            )
        if self.relation is not None and self.relation not in RELATIONS:
            raise ValueError(
                f"relation is {self.relation!r}; expected one of {', '.join(RELATIONS)}"
            )
        if self.ground is not None and self.ground not in GROUNDS:
            raise ValueError(f"ground is {self.ground!r}; expected one of {', '.join(GROUNDS)}")

    @property
    def caption(self) -> str:
        """The scene in words, without its ground; ``parse_caption`` is the inverse."""
        if self.relation is None:
            return self.objects[0].phrase
        return f"{self.objects[0].phrase} {self.relation} {self.objects[1].phrase}"

    @property
    def layout(self) -> str:
        """One of ``LAYOUTS``."""
        if self.relation is None:
            return "single"
        return "horizontal" if self.relation in ("left of", "right of") else "vertical"

    @property
    def placed(self) -> tuple[SceneObject, ...]:
        """The objects in reading order: left before right, top before bottom."""
        return self.objects[::-1] if self.relation in ("right of", "below") else self.objects


def parse_caption(caption: str) -> Scene:
    """The scene that a caption asks for, with an unknown ground.

    Raises:
        ValueError: the caption is not "a <color> <digit>" or
            "a <color> <digit> <relation> a <color> <digit>".
    """
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(
            f'caption is {caption!r}; expected "a <color> <digit>", optionally followed by '
            f'"<relation> a <color> <digit>", with colors {", ".join(COLORS)}, digits in words '
            f"and relations {', '.join(RELATIONS)}"
        )
    color, digit, relation, other_color, other_digit = match.groups()
    objects = (SceneObject(DIGIT_NAMES.index(digit), color),)
    if relation is None:
        return Scene(objects)
    return Scene((*objects, SceneObject(DIGIT_NAMES.index(other_digit), other_color)), relation)


class SceneDataset:
    """Scenes of one or two coloured digits on a coloured ground, with captions.

    The index fixes what a scene shows (digits, scans, colours, relation, ground); ``rng`` draws
    the jitter of the positions. Ink is composited by its intensity: a + intensity·(color - a).

    Args:
        split: whose scans are used: "train", "heldout" or "all".
        image_size: height and width, even and at least 16.
        length: number of scenes.

    Raises:
        ValueError: unknown split, or an ``image_size`` or ``length`` out of range.
    """

    def __init__(
        self, split: str = "train", image_size: int = 32, length: int = DEFAULT_LENGTH
    ) -> None:
        check_split(split)
        if image_size < 16 or image_size % 2:
            raise ValueError(f"image_size is {image_size}; digit-scenes need an even one >= 16")
        if length < 1:
            raise ValueError(f"length is {length}; expected at least 1")
        self.info = DatasetInfo("digit-scenes", image_size, 3, 0, has_captions=True)
        self._length = length
        self._split_number = SPLITS.index(split)
        # 13 of 32 pixels: two digits fit side by side with jitter and a gap of two pixels or more.
        self._digit_size = image_size * 13 // 32
        scans, labels = load_scans(split)
        self._ink = resize_scans(scans, self._digit_size).numpy()
        self._scans_of = [
            np.flatnonzero(labels.numpy() == digit).tolist() for digit in range(NUM_DIGITS)
        ]

    def __len__(self) -> int:
        return self._length

    def scene(self, index: int) -> Scene:
        """What scene ``index`` shows."""
        return self._compose(index)[0]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Scene ``index`` as an image (3, image_size, image_size) with its caption."""
        scene, scans = self._compose(index)
        return Sample(self._render(scene, scans, rng), -1, scene.caption)

    def draw(self, scene: Scene, rng: np.random.Generator) -> torch.Tensor:
        """A new image (3, image_size, image_size) of ``scene``.

        Scans, positions and, where ``scene`` leaves it open, the ground come from ``rng``.
        """
        ground = scene.ground or list(GROUNDS)[rng.integers(len(GROUNDS))]
        return self._render(replace(scene, ground=ground), self._choose_scans(scene, rng), rng)

    def _render(self, scene: Scene, scans: list[int], rng: np.random.Generator) -> torch.Tensor:
        assert scene.ground is not None
        size = self.info.image_size
        canvas = np.empty((3, size, size), np.float32)
        canvas[:] = _rgb(GROUNDS[scene.ground])
        corners = self._corners(scene.layout, rng)
        for item, scan, (top, left) in zip(scene.placed, scans, corners, strict=True):
            area = canvas[:, top : top + self._digit_size, left : left + self._digit_size]
            area += self._ink[scan] * (_rgb(COLORS[item.color]) - area)
        return torch.from_numpy(canvas * 2.0 - 1.0)

    def _compose(self, index: int) -> tuple[Scene, list[int]]:
        """The scene and the scan of each object in reading order, from the index alone."""
        check_index(index, len(self))
        rng = np.random.default_rng([_CONTENT_STREAM, self._split_number, index])
        single = rng.random() < SINGLE_FRACTION
        relation = None if single else str(rng.choice(RELATIONS))
        colors, grounds = list(COLORS), list(GROUNDS)
        objects = tuple(
            SceneObject(int(rng.integers(NUM_DIGITS)), colors[rng.integers(len(colors))])
            for _ in range(1 if single else 2)
        )
        scene = Scene(objects, relation, grounds[rng.integers(len(grounds))])
        return scene, self._choose_scans(scene, rng)

    def _choose_scans(self, scene: Scene, rng: np.random.Generator) -> list[int]:
        candidates = [self._scans_of[item.digit] for item in scene.placed]
        return [scans[rng.integers(len(scans))] for scans in candidates]

    def _corners(self, layout: str, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Top-left corner (row, column) of each digit in reading order."""
        size, digit = self.info.image_size, self._digit_size
        half = size // 2
        centre = (size - digit) // 2

        def jitter(reach: int) -> int:
            return int(rng.integers(-reach, reach + 1))

        if layout == "single":
            reach = size * 5 // 32
            return [(centre + jitter(reach), centre + jitter(reach))]
        corners = []
        for start in (0, half + 1):
            along = start + int(rng.integers(half - digit))
            across = centre + jitter(size * 3 // 32)
            corners.append((across, along) if layout == "horizontal" else (along, across))
        return corners


def _rgb(color: tuple[float, float, float]) -> np.ndarray:
    """(3, 1, 1) float32."""
    return np.array(color, np.float32)[:, None, None]
