"""Folders of images: one sub-folder a class, or a metadata.jsonl with a caption an image."""

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from dit_models.data.base import DatasetInfo, Sample, check_index
from dit_models.extras import require

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
METADATA_NAME = "metadata.jsonl"
FOLDER_SPLITS = ("train", "test", "val", "validation", "heldout")


def read_image(path: Path | str, image_size: int, stream: BinaryIO | None = None) -> Tensor:
    """Decode an image, cut its central square and resize that (Lanczos).

    The EXIF orientation is applied; an alpha channel is dropped.

    Args:
        path: the file; with ``stream``, only what errors call it.
        image_size: height and width of the result.
        stream: the file's content, where it is not at ``path``.

    Returns:
        (3, image_size, image_size) float32 in [-1, 1].

    Raises:
        ValueError: names a file that cannot be decoded, or that has more than 8 bits a channel.
    """
    image_module = require("PIL.Image", extra="train")
    image_ops = require("PIL.ImageOps", extra="train")
    try:
        with image_module.open(stream or path) as file:
            mode = file.mode
            image = image_ops.exif_transpose(file)
            image.load()
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        # Pillow's own words name the address of a stream, which no two runs share.
        unknown = isinstance(error, image_module.UnidentifiedImageError)
        reason = "its format is not known" if unknown else error
        raise ValueError(f"cannot decode the image {path}: {reason}") from error
    if mode.startswith(("I", "F")):
        # Pillow would clip these to 255 without a word.
        raise ValueError(f"{path} has mode {mode!r}; convert it to 8 bits a channel first")
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize(
        (image_size, image_size),
        resample=image_module.Resampling.LANCZOS,
        box=(left, top, left + side, top + side),
    )
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1.0
    return torch.from_numpy(np.ascontiguousarray(pixels))


class _Images:
    """Image files, and what the two kinds of folder share about them."""

    def __init__(self, files: list[Path], info: DatasetInfo, flip: bool) -> None:
        if info.image_size < 1:
            raise ValueError(f"image_size is {info.image_size}; expected at least 1")
        self.files = files
        self.info = info
        self.flip = flip

    def __len__(self) -> int:
        return len(self.files)

    def _image(self, index: int, rng: np.random.Generator) -> Tensor:
        check_index(index, len(self))
        image = read_image(self.files[index], self.info.image_size)
        return image.flip(-1) if self.flip and rng.random() < 0.5 else image


class ClassFolderDataset(_Images):
    """Images in one sub-folder a class; class names are sorted.

    Args:
        root: the folder, with class folders or with one folder a split (``train``, ``test``, ...).
        image_size: height and width that images are cut and resized to.
        split: used where ``root`` has a folder for each split; class numbers then count the
            classes of all splits together, so that they agree between splits.
        flip: mirror half of the images, as drawn from the sample's ``rng``.

    Attributes:
        class_names: names in label order.

    Raises:
        ValueError: no images, or no folder of that split.
    """

    def __init__(
        self, root: str | Path, image_size: int, split: str = "train", flip: bool = False
    ) -> None:
        root = Path(root)
        folder = split_folder(root, split)
        parents = [root] if folder == root else _visible_folders(root)
        self.class_names = sorted({f.name for p in parents for f in _visible_folders(p)})
        files: list[Path] = []
        self.labels: list[int] = []
        for label, name in enumerate(self.class_names):
            of_class = sorted(f for f in (folder / name).rglob("*") if _is_image(f))
            files += of_class
            self.labels += [label] * len(of_class)
        if not files:
            raise ValueError(
                f"{folder} has no images; expected {METADATA_NAME}, or one sub-folder a class "
                f"with files ending in {', '.join(IMAGE_SUFFIXES)}"
            )
        info = DatasetInfo(root.name, image_size, 3, len(self.class_names), has_captions=False)
        super().__init__(files, info, flip)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image ``index`` with its class."""
        return Sample(self._image(index, rng), self.labels[index], "")


class CaptionFolderDataset(_Images):
    """Images with captions, listed in ``metadata.jsonl`` as ``file_name`` and ``text``.

    Args:
        root: the folder that holds ``metadata.jsonl``, or one folder a split that do.
        image_size: height and width that images are cut and resized to.
        split: used where ``root`` has a folder for each split.
        flip: mirror half of the images; wrong for captions that say left or right.

    Raises:
        ValueError: names the line that is not JSON, lacks a field, points outside the folder or
            at a missing file; or there are no lines, or no folder of that split.
    """

    def __init__(
        self, root: str | Path, image_size: int, split: str = "train", flip: bool = False
    ) -> None:
        root = Path(root)
        metadata = split_folder(root, split) / METADATA_NAME
        files: list[Path] = []
        self.captions: list[str] = []
        with metadata.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    file, caption = _read_entry(line, metadata.parent, f"{metadata} line {number}")
                    files.append(file)
                    self.captions.append(caption)
        if not files:
            raise ValueError(f"{metadata} lists no images")
        super().__init__(files, DatasetInfo(root.name, image_size, 3, 0, has_captions=True), flip)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image ``index`` with its caption."""
        return Sample(self._image(index, rng), -1, self.captions[index])


def split_folder(root: Path, split: str) -> Path:
    """``root/split`` where every sub-folder is named as a split, else ``root``.

    Raises:
        ValueError: ``root`` is no folder, or has splits but not the one asked for.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    names = [folder.name for folder in _visible_folders(root)]
    has_splits = bool(names) and all(name in FOLDER_SPLITS for name in names)
    if not has_splits or (root / METADATA_NAME).exists():
        return root
    if split not in names:
        raise ValueError(f"{root} has the splits {', '.join(names)}; asked for {split!r}")
    return root / split


def _read_entry(line: str, folder: Path, where: str) -> tuple[Path, str]:
    """File and caption of one line of metadata.jsonl; ``where`` names the line in errors."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is not a JSON object")
    for field in ("file_name", "text"):
        if not isinstance(entry.get(field), str):
            raise ValueError(f"{where} lacks the string field {field!r}")
    name = entry["file_name"]
    # Both flavours, so that a list is as safe on one system as on the other. Symbolic links are
    # left alone: download caches are made of them.
    for flavour in (PurePosixPath(name), PureWindowsPath(name)):
        if flavour.anchor or ".." in flavour.parts:
            raise ValueError(f"{where}: file_name {name!r} leads outside the folder {folder}")
    file = folder / name
    if not file.is_file():
        raise ValueError(f"{where}: there is no file {file}")
    return file, entry["text"]


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
