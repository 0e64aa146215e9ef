"""Tensors in files, by place: what is stored where, read when needed, written one after another.

So a checkpoint of any size is copied, split and joined in the memory of one block. A safetensors
file is eight bytes that hold the header's length, the header (JSON: name -> dtype, shape, byte
range), and the bytes (https://github.com/huggingface/safetensors, "Format").
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A shard of this many bytes is loaded, checked and uploaded in a reasonable time.
MAX_SHARD_BYTES = 5_000_000_000
BLOCK_BYTES = 16 << 20
_HEADER_LIMIT = 100_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor in a file: ``path`` from byte ``start`` on."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, begin: int, end: int) -> "StoredTensor":
        """Rows ``begin`` to ``end`` of its first dimension, as a tensor in the same file."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        start = self.start + begin * row
        return StoredTensor(self.path, start, self.dtype, (end - begin, *self.shape[1:]))

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, in blocks of at most 16 MiB.

        Raises:
            ValueError: the file ends before the tensor does.
        """
        left = self.num_bytes
        with open(self.path, "rb", buffering=0) as stream:
            stream.seek(self.start)
            while left:
                block = stream.read(min(left, BLOCK_BYTES))
                if not block:
                    raise self._cut_short(left)
                left -= len(block)
                yield block

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            ValueError: the file ends before the tensor does.
        """
        data = torch.empty(self.num_bytes, dtype=torch.uint8)
        rest = data.numpy().data
        with open(self.path, "rb", buffering=0) as stream:
            stream.seek(self.start)
            while len(rest):
                count = stream.readinto(rest)
                if not count:
                    raise self._cut_short(len(rest))
                rest = rest[count:]
        return data.view(self.dtype).view(self.shape)

    def _cut_short(self, left: int) -> ValueError:
        return ValueError(f"{self.path} ends {left} bytes before its tensors do.")


class TensorEntry(NamedTuple):
    """A tensor to be written; ``blocks()`` gives its bytes in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Any]]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def entry_of(value: Tensor | StoredTensor) -> TensorEntry:
    """The entry that writes a tensor as it is."""
    if isinstance(value, StoredTensor):
        return TensorEntry(value.dtype, value.shape, value.blocks)

    def blocks() -> list[Any]:
        flat = value.detach().cpu().contiguous().flatten()
        return [flat.view(torch.uint8).numpy()] if flat.numel() else []

    return TensorEntry(value.dtype, tuple(value.shape), blocks)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds.

    Raises:
        ValueError: it is no safetensors file, or is cut short.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(f"{path} is no safetensors file, or is cut short.")
        try:
            header = json.loads(stream.read(length))
            tensors = {
                name: StoredTensor(
                    path,
                    8 + length + entry["data_offsets"][0],
                    DTYPES[entry["dtype"]],
                    tuple(entry["shape"]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} has a damaged safetensors header ({error!r}).") from error
    for name, tensor in tensors.items():
        begin, end = header[name]["data_offsets"]
        if end - begin != tensor.num_bytes or begin < 0 or 8 + length + end > size:
            raise ValueError(
                f"{path}: tensor {name} of {tensor.num_bytes} bytes has the byte range "
                f"{begin}-{end} in a file of {size} bytes; the file is damaged or cut short."
            )
    return tensors


def write_safetensors(
    path: Path, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, an entry after the other, and flush it to the disk."""
    with open(path, "wb") as stream:
        stream_safetensors(stream.write, entries, metadata)
        stream.flush()
        os.fsync(stream.fileno())


def stream_safetensors(
    write: Callable[[Any], Any],
    entries: Mapping[str, TensorEntry],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Give the content of a safetensors file to ``write``, block by block.

    Returns:
        The byte at which each tensor begins.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    # Wide elements first: then each tensor starts at a multiple of its own element size.
    names = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)
    position = 0
    for name in names:
        entry = entries[name]
        header[name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.num_bytes],
        }
        position += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write(len(text).to_bytes(8, "little") + text)
    for name in names:
        written = 0
        for block in entries[name].blocks():
            write(block)
            written += memoryview(block).nbytes
        assert written == entries[name].num_bytes, (name, written, entries[name].num_bytes)
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name in names}


def write_sharded(
    folder: Path,
    stem: str,
    entries: Mapping[str, TensorEntry],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Write ``stem.safetensors``, or shards with ``stem.safetensors.index.json`` above a size.

    The names of the files and the index are those of transformers and diffusers.

    Returns:
        The names of the files written.
    """
    shards = _divide(entries, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", entries)
        return [f"{stem}.safetensors"]
    weight_map, files = {}, []
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {name: entries[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
        files.append(file)
    total = sum(entry.num_bytes for entry in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return [*files, f"{stem}.safetensors.index.json"]


def _divide(entries: Mapping[str, TensorEntry], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in entries.items():
        if shards[-1] and filled + entry.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += entry.num_bytes
    return shards


def read_sharded(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """What ``stem.safetensors`` or its shards hold.

    Raises:
        ValueError: neither is there, a shard is missing, or the index names another content.
    """
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return read_header(single)
    index_path = folder / f"{stem}.safetensors.index.json"
    if not index_path.is_file():
        raise ValueError(f"{folder} has neither {single.name} nor {index_path.name}.")
    try:
        weight_map: dict[str, str] = json.loads(index_path.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index_path} is damaged ({error!r}).") from error
    if unsafe := [file for file in files if Path(file).name != file]:
        raise ValueError(f"{index_path} names files outside its folder: {unsafe}.")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index_path.name} names.")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors.update(read_header(folder / file))
    check_names(tensors, weight_map, str(index_path))
    return tensors


def check_names(given: Iterable[str], expected: Iterable[str], where: str) -> None:
    """Raise ValueError that lists what is missing and what is unknown, unless both are equal."""
    missing = sorted(set(expected) - set(given))
    unknown = sorted(set(given) - set(expected))
    if missing or unknown:
        parts = [_listing(len(missing), "missing", missing)] if missing else []
        parts += [_listing(len(unknown), "unknown", unknown)] if unknown else []
        raise ValueError(f"{where}: {'; '.join(parts)}.")


def _listing(count: int, kind: str, names: Sequence[str]) -> str:
    return f"{count} {kind} tensor{'s' if count > 1 else ''}: {', '.join(names)}"
