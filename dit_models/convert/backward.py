"""From a folder of ours to a checkpoint of others, tensor after tensor."""

import json
import mmap
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dit_models.atomic import fsync_path
from dit_models.convert.formats import FORMATS
from dit_models.convert.forward import KEPT_NAME, RECORD_NAME
from dit_models.convert.layout import Layout, our_shapes, separated
from dit_models.convert.positions import positions_of
from dit_models.convert.source import DIFFUSERS_STEM
from dit_models.pretrained import MODEL_STEM, new_folder, read_pretrained
from dit_models.tensor_files import (
    MAX_SHARD_BYTES,
    StoredTensor,
    check_names,
    entry_of,
    read_header,
    read_sharded,
    write_safetensors,
    write_sharded,
)

# Read pages of our files are given back to the system after so many written bytes.
_RELEASE_EVERY = 64 << 20


def restore(
    folder: Path, out: Path, *, to: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> str:
    """Write a model of ours in another format.

    A converted model becomes what it was: every tensor has its name, shape, dtype and bits again,
    in the container it had. A model that was trained here needs ``to``.

    Args:
        folder: what ``convert`` or ``export`` wrote.
        out: a ``.pt`` or ``.safetensors`` file, or a folder for diffusers.
        to: name of a format, instead of the one that the model had.
        max_shard_bytes: of the files of a diffusers folder.

    Returns:
        The name of the format.

    Raises:
        ValueError: the model cannot be written in this format, or ``out`` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists; choose another name. Nothing was written.")
    described = read_pretrained(folder)
    record = _read_record(folder)
    name = to or (record or {}).get("format")
    if name is None:
        raise ValueError(
            f"{folder} was not converted from another format; say which with --to "
            f"({', '.join(FORMATS)})."
        )
    if name not in FORMATS:
        raise ValueError(f"--to {name}; expected one of {', '.join(FORMATS)}.")
    if record is None or record["format"] != name:
        variant, container, positions = FORMATS[name].default_variant(described.model), None, None
    else:
        variant, container, positions = (record[k] for k in ("variant", "container", "positions"))
    layout = FORMATS[name].layout(described.model, variant)
    ours = read_sharded(folder, MODEL_STEM)
    shapes = our_shapes(described.model)
    check_names(ours, shapes, str(folder))
    if wrong := [name for name, shape in shapes.items() if ours[name].shape != shape]:
        raise ValueError(f"{folder}: {', '.join(wrong)} do not have the shape of config.json.")
    tensors: dict[str, StoredTensor | Tensor] = {**separated(ours, layout)}
    if layout.positions is not None:
        tensors[layout.positions.name] = _positions(
            folder, layout, positions, described.model, ours
        )
    if name == "diffusers":
        _write_diffusers(out, tensors, variant["diffusers_config"], max_shard_bytes)
    elif out.suffix == ".safetensors":
        if container:
            raise ValueError(
                f"{out}: the source kept its weights under {container!r}, which a safetensors file "
                "does not have; write a .pt file."
            )
        _write_file(
            out, lambda path: write_safetensors(path, {k: entry_of(v) for k, v in tensors.items()})
        )
    else:
        _write_file(out, lambda path: _write_torch(path, tensors, container))
    return name


def _read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD_NAME
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        missing = {"format", "variant", "container", "positions"} - set(record)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}.")
    return record


def _positions(
    folder: Path,
    layout: Layout,
    record: dict[str, Any] | None,
    model: Any,
    ours: Mapping[str, StoredTensor],
) -> Tensor:
    assert layout.positions is not None
    if record is None:
        return positions_of(model, ours["x_embedder.proj.weight"].dtype)
    if record["kept"]:
        return read_header(folder / KEPT_NAME)[layout.positions.name].read()
    return positions_of(model, getattr(torch, record["dtype"]))


def _write_diffusers(
    out: Path,
    tensors: Mapping[str, StoredTensor | Tensor],
    config: dict[str, Any],
    max_shard_bytes: int,
) -> None:
    with new_folder(out) as folder:
        entries = {name: entry_of(value) for name, value in tensors.items()}
        write_sharded(folder, DIFFUSERS_STEM, entries, max_shard_bytes)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_file(out: Path, write: Any) -> None:
    """Run ``write(path)`` on a temporary name and rename it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".writing-{out.name}-{os.getpid()}")
    try:
        write(temporary)
        fsync_path(temporary)
        os.link(temporary, out)  # unlike a rename, never replaces a file that appeared meanwhile
    except FileExistsError as error:
        raise ValueError(f"{out} exists; choose another name. Nothing was written.") from error
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(out.parent)


def _write_torch(
    path: Path, tensors: Mapping[str, StoredTensor | Tensor], container: str | None
) -> None:
    """``torch.save`` of tensors that lie in mapped files, so that few of them are in memory."""
    with ExitStack() as stack:
        maps: dict[Path, mmap.mmap] = {}
        for value in tensors.values():
            if isinstance(value, StoredTensor) and value.path not in maps:
                file = stack.enter_context(open(value.path, "rb"))
                maps[value.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        state = {name: _mapped(value, maps) for name, value in tensors.items()}
        with open(path, "wb") as out:
            stream: Any = _Releasing(out, maps)
            torch.save(state if container is None else {container: state}, stream)


def _mapped(value: StoredTensor | Tensor, maps: Mapping[Path, mmap.mmap]) -> Tensor:
    if isinstance(value, Tensor):
        return value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is read-only: it is only read
        count = value.num_bytes // value.dtype.itemsize
        flat = torch.frombuffer(
            maps[value.path], dtype=value.dtype, count=count, offset=value.start
        )
    return flat.view(value.shape)


class _Releasing:
    """A stream that drops what was read of mapped files from this process's memory as it writes."""

    def __init__(self, stream: BinaryIO, maps: Mapping[Path, mmap.mmap]) -> None:
        self._stream = stream
        self._maps = maps
        self._since_release = 0

    def write(self, data: bytes) -> int:
        self._stream.write(data)
        self._since_release += len(data)
        if self._since_release >= _RELEASE_EVERY and hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)
            self._since_release = 0
        return len(data)

    def flush(self) -> None:
        self._stream.flush()
