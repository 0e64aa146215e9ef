"""Precomputed images: latents (or pixels), conditions and text features in sharded safetensors."""

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_models.data.base import DatasetInfo, Sample, check_index
from dit_models.extras import require

MANIFEST_NAME = "latents.json"
UNFINISHED_NAME = "unfinished.json"
NULL_TEXT_NAME = "null_text.safetensors"
FORMAT = "dit-moe-latents"
FORMAT_VERSION = 1
# Shards that a process keeps mapped; a map takes address space and one open file, no memory.
_OPEN_SHARDS = 256


def is_latents_folder(folder: Path) -> bool:
    """Whether ``python -m dit_models.precompute`` made this folder, or has begun to."""
    return (folder / MANIFEST_NAME).is_file() or (folder / UNFINISHED_NAME).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder.

    Raises:
        ValueError: it is not finished, damaged, or of another version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file() and (folder / UNFINISHED_NAME).is_file():
        raise ValueError(f"{folder} is not finished; run its precompute command again.")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        known = manifest["format"], manifest["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    if known != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"{path} has format {known}; expected {(FORMAT, FORMAT_VERSION)}.")
    return manifest


class _Shard:
    """One mapped file; only what is read comes into memory."""

    def __init__(self, path: Path) -> None:
        safetensors = require("safetensors", extra="train")
        self.file = safetensors.safe_open(path, framework="pt")
        self.names = set(self.file.keys())
        self._small: dict[str, Tensor] = {}

    def row(self, name: str, row: int) -> Tensor:
        """A copy of one row, as fp32 where it is floating point."""
        return self.file.get_slice(name)[row : row + 1][0].to(torch.float32, copy=True)

    def small(self, name: str) -> Tensor:
        """A whole tensor of a number a sample, kept."""
        if name not in self._small:
            self._small[name] = self.file.get_tensor(name)
        return self._small[name]

    def ragged(self, name: str, row: int) -> Tensor:
        """A copy of row ``row`` of those that ``name_offsets`` cuts ``name`` into."""
        start, end = self.small(f"{name}_offsets")[row : row + 2].tolist()
        return self.file.get_slice(name)[start:end].clone()


class LatentDataset:
    """A folder of ``python -m dit_models.precompute``, read by random access to mapped files.

    Args:
        folder: with ``latents.json``.
        flip: take the mirrored version of half of the samples, as drawn from the sample's ``rng``.

    Attributes:
        manifest: its content.
        null_text: features (n, dim) of the null caption, where text was encoded.

    Raises:
        ValueError: not finished, a missing or cut shard, or ``flip`` without stored flips.
    """

    def __init__(self, folder: str | Path, flip: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.flip = flip
        if flip and not self.manifest["settings"]["flip"]:
            raise ValueError(
                f"data.flip is set and {folder} has no mirrored images; leave it out, or "
                "precompute again with --flip."
            )
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        check_sizes(self.folder, self.manifest)
        self._starts = [0, *accumulate(shard["count"] for shard in self.shards)]
        digest = hashlib.sha256((self.folder / MANIFEST_NAME).read_bytes()).hexdigest()
        info = self.manifest["info"]
        # The digest binds checkpoints to these very latents, wherever the folder moves.
        self.info = DatasetInfo(
            **(info | {"name": f"{info['name']}@{digest[:16]}"}),
            vae=self.manifest["vae"],
            text=self.manifest["text"],
        )
        self.null_text: Tensor | None = None
        if self.info.text is not None:
            safetensors = require("safetensors.torch", extra="train")
            self.null_text = safetensors.load_file(self.folder / NULL_TEXT_NAME)["text"]
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the files itself.
        return self.__dict__ | {"_open": OrderedDict()}

    @property
    def longest_caption(self) -> str:
        """The caption with the most bytes."""
        return self.manifest["longest_caption"]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Sample ``index``; ``rng`` draws its flip and, from stored moments, its latent."""
        check_index(index, len(self))
        number = bisect_right(self._starts, index) - 1
        shard, row = self._shard(number), index - self._starts[number]
        name = "flipped" if self.flip and rng.random() < 0.5 else "images"
        image = shard.row(name, row)
        if f"{name}_std" in shard.names:
            noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
            image = image + shard.row(f"{name}_std", row) * noise
        label = int(shard.small("labels")[row]) if self.info.num_classes else -1
        caption = ""
        if self.info.has_captions:
            caption = bytes(shard.ragged("captions", row).numpy()).decode()
        text = shard.ragged("text", row) if self.info.text is not None else None
        return Sample(image, label, caption, text)

    def _shard(self, number: int) -> _Shard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) >= _OPEN_SHARDS:
            self._open.popitem(last=False)
        self._open[number] = _Shard(self.folder / self.shards[number]["file"])
        return self._open[number]


def check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise ValueError when a file of the manifest is missing or has another size."""
    for entry in all_files(manifest):
        path = folder / entry["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes, not {entry['bytes']}"
            raise ValueError(
                f"{path} {found}. The precompute command that made {folder} makes such files again."
            )


def all_files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries (file, bytes, sha256) of every file that a manifest vouches for."""
    null_text = manifest["null_text"]
    return [*manifest["shards"], *([null_text] if null_text else [])]
