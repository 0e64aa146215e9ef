"""Where images come from: embedded data, folders, WebDataset tars, Hugging Face data sets."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_models.data import (
    BUILTIN_DATASETS,
    CaptionFolderDataset,
    ClassFolderDataset,
    ImageDataset,
    build_dataset,
)
from dit_models.data.latents import is_latents_folder
from dit_models.precompute.huggingface import open_huggingface
from dit_models.precompute.settings import Settings, refuse_split
from dit_models.precompute.tars import is_tars, open_tars


@dataclass(frozen=True)
class Source:
    """An image source.

    Attributes:
        kind: "embedded", "folder", "webdataset" or "huggingface".
        dataset: by random access, without flips.
        fingerprint: SHA-256 over what it lists (names, sizes, conditions), not over the pixels.
        class_names: in label order, where they have names.
    """

    kind: str
    dataset: ImageDataset
    fingerprint: str
    class_names: list[str] | None


def open_source(settings: Settings) -> Source:
    """The source that the settings name.

    Raises:
        ValueError: it is not there, holds no images, or an option does not fit it.
    """
    kind = settings.kind if settings.kind != "auto" else _kind_of(settings.source)
    if kind in ("embedded", "folder") and settings.conditions != "auto":
        raise ValueError(f"--conditions has no effect on a source of kind {kind}; leave it out.")
    columns = ("image_column", "label_column", "caption_column", "subset")
    if kind != "huggingface":
        for name in columns:
            if getattr(settings, name):
                raise ValueError(f"--{name.replace('_', '-')} has no effect on kind {kind}.")
    if kind == "embedded" and settings.flip:
        build_dataset(settings.source, flip=True)  # which says why not
    if kind in ("webdataset", "huggingface") and settings.image_size is None:
        raise ValueError(f"--image-size is missing; a source of kind {kind} needs one.")
    if kind == "webdataset":
        refuse_split(settings, "tar files, all of which are read")
        tars, listed = open_tars(settings.source, settings.image_size or 0, settings.conditions)
        return Source(kind, tars, fingerprint_of(listed), None)
    if kind == "huggingface":
        table, names, listed = open_huggingface(settings)
        return Source(kind, table, fingerprint_of(listed), names)
    if is_latents_folder(Path(settings.source)):
        raise ValueError(
            f"{settings.source} is precomputed already; give the images that it was made from."
        )
    dataset = build_dataset(settings.source, split=settings.split, image_size=settings.image_size)
    return Source(kind, dataset, fingerprint_of(_listed(dataset)), _class_names(dataset))


def fingerprint_of(listed: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def _kind_of(source: str) -> str:
    if source in BUILTIN_DATASETS:
        return "embedded"
    path = Path(source)
    if is_tars(source):
        return "webdataset"
    saved = ("dataset_info.json", "dataset_dict.json", "state.json")
    parquet = path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet")))
    if parquet or any((path / name).is_file() for name in saved):
        return "huggingface"
    return "folder"


def _listed(dataset: ImageDataset) -> Any:
    """What identifies an embedded data set or a folder of images."""
    if isinstance(dataset, ClassFolderDataset):
        conditions: Sequence[Any] = dataset.labels
    elif isinstance(dataset, CaptionFolderDataset):
        conditions = dataset.captions
    else:
        return [dataset.info.name, dataset.info.image_size, len(dataset)]
    sizes = [file.stat().st_size for file in dataset.files]
    names = ["/".join(file.parts[-2:]) for file in dataset.files]
    return [_class_names(dataset), list(zip(names, sizes, conditions, strict=True))]


def _class_names(dataset: ImageDataset) -> list[str] | None:
    return dataset.class_names if isinstance(dataset, ClassFolderDataset) else None
