"""What is in the folder of a sharded checkpoint, and how one process reads it.

=========================  ========================================================================
``rank_XXXXX.safetensors`` what one process held of each tensor: its chunks
``index.json``             of each tensor the shape, the dtype, and where its chunks are
``plain.json``             what is no tensor: config, position in the data, times
``manifest.json``          step, and the SHA-256 of every other file
=========================  ========================================================================

The chunks' headers hold their offsets as ``torch.distributed.checkpoint.HuggingFaceStorageReader``
expects them, so that other programs can load the folder too. There is no pickle in it.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_models.checkpoints import INDEX_NAME, PLAIN_NAME, CheckpointError, read_manifest
from dit_models.tensor_files import (
    BLOCK_BYTES,
    DTYPE_NAMES,
    DTYPES,
    StoredTensor,
    TensorEntry,
    entry_of,
)

_SHARD_NAME = re.compile(r"rank_\d{5,}\.safetensors")


def shard_name(rank: int) -> str:
    """The file of one process."""
    return f"rank_{rank:05d}.safetensors"


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor.

    Attributes:
        offsets, sizes: where the box is in the tensor.
        content: its values, in a file or in memory.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    content: StoredTensor | Tensor

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows ``begin`` to ``end`` of the box; of a scalar, the scalar."""
        content = self.content
        if isinstance(content, Tensor):
            return content[begin:end] if self.sizes else content
        return (content.rows(begin, end) if self.sizes else content).read()


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor in chunks, read when needed."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows ``begin`` to ``end`` of its first dimension, joined."""
        if len(self.chunks) == 1:
            return self.chunks[0].rows(begin, end)
        joined = torch.empty((end - begin, *self.shape[1:]), dtype=self.dtype)
        for chunk in self.chunks:
            first = max(begin, chunk.offsets[0])
            last = min(end, chunk.offsets[0] + chunk.sizes[0])
            if first < last and all(chunk.sizes):
                inner = zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
                box = (slice(first - begin, last - begin), *(slice(o, o + s) for o, s in inner))
                joined[box] = chunk.rows(first - chunk.offsets[0], last - chunk.offsets[0])
        return joined

    def read(self) -> Tensor:
        """The whole tensor."""
        if self.shape:
            return self.rows(0, self.shape[0])
        return self.chunks[0].rows(0, 1)

    def parts(self) -> Iterator[Tensor]:
        """The whole tensor in runs of rows: at least one row, and about 16 MiB, at a time."""
        if not self.shape:
            yield self.read()
            return
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        count = max(1, BLOCK_BYTES // max(row, 1))
        for begin in range(0, self.shape[0], count):
            yield self.rows(begin, min(begin + count, self.shape[0]))


def in_one_piece(value: StoredTensor | Tensor) -> JoinedTensor:
    """A tensor that is not divided."""
    shape = tuple(value.shape)
    return JoinedTensor(value.dtype, shape, (Chunk((0,) * len(shape), shape, value),))


def joined_entry(value: JoinedTensor, dtype: torch.dtype) -> TensorEntry:
    """The entry that writes a tensor in another dtype, some rows at a time."""

    def blocks() -> Iterator[Any]:
        for part in value.parts():
            yield from entry_of(part.to(dtype)).blocks()

    return TensorEntry(dtype, value.shape, blocks)


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint is one of several processes."""
    return (checkpoint / INDEX_NAME).exists() or any(checkpoint.glob("rank_*.safetensors"))


def index_text(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    chunks: Mapping[str, Iterable[dict[str, Any]]],
) -> str:
    """The content of ``index.json``.

    Args:
        tensors: shape and dtype of each tensor.
        chunks: of each tensor, its chunks as ``{"file", "start", "offsets", "sizes"}``.
    """
    values = {
        name: {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "chunks": list(chunks[name])}
        for name, (shape, dtype) in tensors.items()
    }
    return json.dumps({"tensors": values}, separators=(",", ":")) + "\n"


def read_index(checkpoint: Path) -> dict[str, JoinedTensor]:
    """The tensors of a sharded checkpoint by name; nothing of them is read yet.

    Raises:
        CheckpointError: the index is missing, or is none.
    """
    _, hashes = read_manifest(checkpoint)
    values = _read_json(checkpoint / INDEX_NAME)
    try:
        return {
            name: _tensor_of(checkpoint, hashes, entry) for name, entry in values["tensors"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint / INDEX_NAME} is damaged ({error}). Nothing was changed."
        ) from error


def _tensor_of(folder: Path, hashes: Mapping[str, str], entry: dict[str, Any]) -> JoinedTensor:
    dtype, shape = DTYPES[entry["dtype"]], _sizes(entry["shape"])
    chunks = []
    for item in entry["chunks"]:
        file, offsets, sizes = item["file"], _sizes(item["offsets"]), _sizes(item["sizes"])
        if not _SHARD_NAME.fullmatch(file) or file not in hashes:
            raise ValueError(f"it names the file {file!r}")
        inside = len(offsets) == len(sizes) == len(shape) and all(
            offset + size <= whole
            for offset, size, whole in zip(offsets, sizes, shape, strict=True)
        )
        if not inside:
            raise ValueError(f"a chunk of {sizes} at {offsets} in a tensor of {shape}")
        (start,) = _sizes([item["start"]])
        chunks.append(Chunk(offsets, sizes, StoredTensor(folder / file, start, dtype, sizes)))
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"the chunks of a tensor of {shape} do not fill it")
    return JoinedTensor(dtype, shape, tuple(chunks))


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(values)
    if not all(type(value) is int and value >= 0 for value in sizes):
        raise ValueError(f"{values} are no sizes")
    return sizes


def read_plain(checkpoint: Path) -> dict[str, Any]:
    """What is no tensor in a sharded checkpoint.

    Raises:
        CheckpointError: ``plain.json`` is missing or damaged.
    """
    return _read_json(checkpoint / PLAIN_NAME)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged ({error}). Nothing was changed."
        ) from error
    return values


def stored_tensors(checkpoint: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a sharded checkpoint.

    Raises:
        CheckpointError: its index is missing or damaged.
    """
    return {name: (value.shape, value.dtype) for name, value in read_index(checkpoint).items()}
