"""Images of a Hugging Face data set: saved to disk, parquet files, or by name."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dit_models.data import DatasetInfo, Sample
from dit_models.data.base import check_index
from dit_models.data.folders import read_image
from dit_models.extras import require
from dit_models.precompute.settings import Settings, refuse_split

_CAPTION_NAMES = ("text", "caption", "prompt")
_LABEL_NAMES = ("label", "labels", "class")


class HuggingFaceDataset:
    """Rows with an image and a class or a caption.

    Args:
        table: a ``datasets.Dataset``.
        name: what it is called.
        image_size: height and width that images are cut and resized to.
        image, label, caption: columns; of the last two one is empty.
        num_classes: of the labels.
    """

    def __init__(
        self, table: Any, name: str, image_size: int, image: str, label: str, caption: str,
        num_classes: int,
    ) -> None:  # fmt: skip
        datasets = require("datasets", extra="data")
        # Undecoded, so that sizes and broken files are treated as in a folder of images.
        self.table = table.cast_column(image, datasets.Image(decode=False))
        self.image, self.label, self.caption = image, label, caption
        self.info = DatasetInfo(name, image_size, 3, num_classes, has_captions=bool(caption))

    def __len__(self) -> int:
        return len(self.table)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Row ``index``; nothing about it is random."""
        check_index(index, len(self))
        row = self.table[index]
        stored = row[self.image]
        where = f"{self.info.name} row {index}"
        if stored is None:
            raise ValueError(f"{where} has no image.")
        if stored["bytes"] is not None:
            image = read_image(where, self.info.image_size, io.BytesIO(stored["bytes"]))
        else:
            image = read_image(Path(stored["path"]), self.info.image_size)
        if self.caption:
            caption = row[self.caption] or ""
            if not isinstance(caption, str):
                raise ValueError(f"{where}: the caption is {caption!r}; expected one string.")
            return Sample(image, -1, caption)
        return Sample(image, int(row[self.label]), "")


def open_huggingface(settings: Settings) -> tuple[HuggingFaceDataset, list[str] | None, Any]:
    """The data set that the settings name, its class names, and what identifies it.

    Raises:
        ValueError: it cannot be had, or its columns are not clear.
    """
    table = _load(settings)
    datasets = require("datasets", extra="data")
    features = table.features
    images = [n for n, kind in features.items() if isinstance(kind, datasets.Image)]
    image = _column("--image-column", settings.image_column, images, features)
    if not image:
        raise ValueError(f"no column of {settings.source} holds images; it has {list(features)}.")
    classes = [n for n, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    classes = classes or [n for n in _LABEL_NAMES if n in features]
    captions = [n for n in _CAPTION_NAMES if n in features]
    label = caption = ""
    if settings.conditions != "captions" and not settings.caption_column:
        label = _column("--label-column", settings.label_column, classes, features)
    if not label and settings.conditions != "labels":
        caption = _column("--caption-column", settings.caption_column, captions, features)
    if not label and not caption:
        raise ValueError(
            f"{settings.source} has no class or caption column that is known; its columns are "
            f"{list(features)}. Name one with --label-column or --caption-column."
        )
    names = features[label].names if label and hasattr(features[label], "names") else None
    labels = list(table[label]) if label else []
    if wrong := [value for value in labels if not isinstance(value, int) or value < 0]:
        raise ValueError(
            f"column {label} of {settings.source} has {len(wrong)} rows whose class is no number "
            f"from 0 on; the first is {wrong[0]!r}."
        )
    num_classes = len(names) if names else max(labels, default=-1) + 1
    dataset = HuggingFaceDataset(
        table, Path(settings.source).name, settings.image_size or 0, image, label, caption,
        num_classes,
    )  # fmt: skip
    columns = [image, label, caption]
    kinds = {name: str(kind) for name, kind in features.items()}
    listed = [len(table), kinds, columns, _files(settings)]
    if not Path(settings.source).exists():
        listed.append(table._fingerprint)
    return dataset, names, listed


def _load(settings: Settings) -> Any:
    datasets = require("datasets", extra="data")
    path = Path(settings.source)
    try:
        if path.is_file() or (path.is_dir() and any(path.glob("*.parquet"))):
            refuse_split(settings, "parquet files, all of which are read")
            files = (
                [str(path)] if path.is_file() else [str(p) for p in sorted(path.glob("*.parquet"))]
            )
            return datasets.load_dataset("parquet", data_files=files, split="train")
        if path.is_dir():
            table = datasets.load_from_disk(str(path))
        else:
            table = datasets.load_dataset(
                settings.source, settings.subset or None, split=settings.split
            )
    except (OSError, ValueError, ConnectionError) as error:
        raise ValueError(
            f"cannot read the Hugging Face data set {settings.source}: {error}"
        ) from error
    if isinstance(table, datasets.DatasetDict):
        if settings.split not in table:
            raise ValueError(
                f"{settings.source} has the splits {', '.join(table)}; asked for {settings.split}."
            )
        table = table[settings.split]
    return table


def _column(option: str, asked: str, candidates: Iterable[str], features: Any) -> str:
    """The column asked for, else the only candidate, else none."""
    if asked:
        if asked not in features:
            raise ValueError(f"{option} {asked}: the columns are {', '.join(features)}.")
        return asked
    found = list(candidates)
    if len(found) > 1:
        raise ValueError(f"columns {', '.join(found)} would all do; choose with {option}.")
    return found[0] if found else ""


def _files(settings: Settings) -> list[tuple[str, int]]:
    """Names and sizes of the files of a data set on disk."""
    path = Path(settings.source)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [(file.name, file.stat().st_size) for file in files] if path.exists() else []
