"""WebDataset shards read by random access: tar files whose members share a key per sample."""

import glob
import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_models.data import DatasetInfo, Sample
from dit_models.data.base import check_index
from dit_models.data.folders import IMAGE_SUFFIXES, read_image
from dit_models.extras import require

_IMAGE_ENDINGS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
_LABEL_ENDINGS = ("cls", "json")
_CAPTION_ENDINGS = ("txt", "caption", "json")
_CAPTION_FIELDS = ("caption", "text", "prompt")
_LABEL_FIELDS = ("cls", "label")


@dataclass
class _Entry:
    """One sample: where its members lie in a tar file, by ending (lower case)."""

    tar: int
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, bytes

    @property
    def image(self) -> str | None:
        return next((ending for ending in _IMAGE_ENDINGS if ending in self.members), None)


class TarDataset:
    """Samples of WebDataset shards, in the order of the files and of the members inside them.

    As the ``webdataset`` library does, consecutive members with one name up to the first dot of
    the file name make a sample, and what follows the dot says what a member is: an image (jpg,
    jpeg, png, webp, bmp), ``cls`` (a class number), ``txt`` or ``caption``, or ``json`` with a
    field caption, text or prompt, or cls or label. Samples without an image are left out.

    Args:
        tars: the files.
        image_size: height and width that images are cut and resized to.
        conditions: "labels", "captions", or "auto" (labels where there are any).

    Raises:
        ValueError: no samples, or one without the condition of the others.
    """

    def __init__(self, tars: list[Path], image_size: int, conditions: str = "auto") -> None:
        self.tars = tars
        self.entries = [entry for number, tar in enumerate(tars) for entry in _index(number, tar)]
        if not self.entries:
            raise ValueError(f"{tars[0]} and {len(tars) - 1} more tar files hold no images.")
        first = self.entries[0]
        if conditions == "auto":
            conditions = "captions" if self._label(first) is None else "labels"
        self.labels: list[int] = []
        if conditions == "labels":
            for entry in self.entries:
                label = self._label(entry)
                if label is None:
                    raise ValueError(f"{self._where(entry)} has no class (cls); see --conditions.")
                if label < 0:
                    raise ValueError(f"{self._where(entry)} has class {label}; expected >= 0.")
                self.labels.append(label)
        elif self._caption(first) is None:
            raise ValueError(f"{self._where(first)} has neither class (cls) nor caption (txt).")
        num_classes = max(self.labels) + 1 if self.labels else 0
        self.info = DatasetInfo(tars[0].stem, image_size, 3, num_classes, not self.labels)

    def __len__(self) -> int:
        return len(self.entries)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Sample ``index``; nothing about it is random."""
        check_index(index, len(self))
        entry = self.entries[index]
        where = self._where(entry)
        assert entry.image is not None
        stream = io.BytesIO(self._read(entry, entry.image))
        image = read_image(where, self.info.image_size, stream)
        if self.labels:
            return Sample(image, self.labels[index], "")
        caption = self._caption(entry)
        if caption is None:
            raise ValueError(f"{where} has no caption (txt, caption or json).")
        return Sample(image, -1, caption)

    def _read(self, entry: _Entry, ending: str) -> bytes:
        offset, size = entry.members[ending]
        with open(self.tars[entry.tar], "rb") as file:
            file.seek(offset)
            return file.read(size)

    def _label(self, entry: _Entry) -> int | None:
        value = self._condition(entry, _LABEL_ENDINGS, _LABEL_FIELDS)
        try:
            # int() would cut off a fraction and take a truth value.
            return None if value is None else int(str(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._where(entry)}: the class {value!r} is no number.") from error

    def _caption(self, entry: _Entry) -> str | None:
        value = self._condition(entry, _CAPTION_ENDINGS, _CAPTION_FIELDS)
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{self._where(entry)}: the caption is {value!r}; expected one string."
            )
        return None if value is None else value.strip()

    def _condition(
        self, entry: _Entry, endings: tuple[str, ...], fields: tuple[str, ...]
    ) -> Any | None:
        for ending in endings:
            if ending not in entry.members:
                continue
            data = self._read(entry, ending)
            try:
                text = data.decode("utf-8")
                if ending != "json":
                    return text
                values = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{self._where(entry)}: cannot read {ending}: {error}") from error
            for name in fields:
                if isinstance(values, dict) and name in values:
                    return values[name]
        return None

    def _where(self, entry: _Entry) -> str:
        return f"{self.tars[entry.tar]}: {entry.key}"


def is_tars(source: str) -> bool:
    """Whether a word names tar files: one, a pattern of them, or a folder with some."""
    return source.endswith(".tar") or (Path(source).is_dir() and any(Path(source).glob("*.tar")))


def open_tars(source: str, image_size: int, conditions: str) -> tuple[TarDataset, Any]:
    """The tar files that a word names, and what identifies them.

    Args:
        source: a tar file, a folder of them, or a pattern: ``train-{0000..0146}.tar``, ``*.tar``.
        image_size: height and width of the images.
        conditions: see ``TarDataset``.

    Raises:
        ValueError: a file that is missing or no tar file.
    """
    if Path(source).is_dir():
        tars = sorted(Path(source).glob("*.tar"))
    elif "{" in source:
        braceexpand = require("braceexpand", extra="data")
        tars = [Path(name) for name in braceexpand.braceexpand(source)]
    else:
        tars = sorted(Path(name) for name in glob.glob(source)) or [Path(source)]
    if not tars:
        raise ValueError(f"{source} holds no tar files.")
    if missing := [str(tar) for tar in tars if not tar.is_file()]:
        raise ValueError(f"no such tar file: {', '.join(missing[:5])}")
    dataset = TarDataset(tars, image_size, conditions)
    return dataset, [
        [(tar.name, tar.stat().st_size) for tar in tars],
        [entry.key for entry in dataset.entries],
        dataset.labels,
    ]


def _index(number: int, tar: Path) -> list[_Entry]:
    """Samples with an image of one tar file; reads its headers and skips the contents."""
    entries: list[_Entry] = []
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, dot, ending = name.partition(".")
                if not member.isfile() or not dot or not stem or stem.startswith("__"):
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if not entries or entries[-1].key != key:
                    entries.append(_Entry(number, key))
                place = (member.offset_data, member.size)
                entries[-1].members.setdefault(ending.lower(), place)
    except tarfile.TarError as error:
        raise ValueError(
            f"{tar} is not an uncompressed tar file, or is cut off: {error}"
        ) from error
    return [entry for entry in entries if entry.image is not None]
