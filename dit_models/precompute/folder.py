"""The folder that a run fills: whole shards, and at the end a manifest that vouches for them."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_models.atomic import fsync_path, sha256_of, write_text
from dit_models.data.latents import (
    MANIFEST_NAME,
    UNFINISHED_NAME,
    all_files,
    read_manifest,
)
from dit_models.extras import require
from dit_models.precompute.settings import differing

try:
    import fcntl
except ImportError:  # not on Windows, where two commands on one folder are not noticed
    fcntl = None  # type: ignore[assignment]

_LOCK_NAME = ".lock"


def shard_name(number: int) -> str:
    """File of shard ``number``."""
    return f"shard_{number:06d}.safetensors"


@contextmanager
def folder_lock(out: Path) -> Iterator[None]:
    """Hold the folder for this command; the lock ends with the process, however it ends.

    Raises:
        ValueError: when another command holds it.
    """
    with open(out / _LOCK_NAME, "w") as stream:
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another command is filling {out}; wait for it.") from error
        yield


def prepare(out: Path, settings: dict[str, Any]) -> None:
    """Make ``out`` ready to be filled with these settings, keeping what is done of them.

    A finished folder of the same settings is opened again when files of it are missing.

    Raises:
        ValueError: it holds other files, or shards of other settings; shows what differs.
    """
    if (out / MANIFEST_NAME).is_file():
        manifest = read_manifest(out)
        _require_same(out, manifest["settings"], settings)
        _reopen(out, manifest)
    elif (out / UNFINISHED_NAME).is_file():
        _require_same(out, json.loads((out / UNFINISHED_NAME).read_text("utf-8")), settings)
    else:
        begun = set(out.glob(f".{UNFINISHED_NAME}.*.tmp"))  # by a command killed right there
        if set(out.iterdir()) - {out / _LOCK_NAME} - begun:
            raise ValueError(
                f"{out} is not empty and holds no precomputed shards; choose another folder."
            )
        write_text(out / UNFINISHED_NAME, _json(settings))
    for leftover in out.glob(".*.tmp"):  # of a killed process
        leftover.unlink(missing_ok=True)


def is_finished(out: Path) -> bool:
    """Whether the manifest stands and every file has its size."""
    if not (out / MANIFEST_NAME).is_file():
        return False
    return not _wrong_sizes(out, read_manifest(out))


def write_shard(out: Path, name: str, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Write a file of tensors, whole or not at all, with a note beside it.

    The note (what a manifest says of the file) comes first: a file without one does not exist.
    """
    safetensors = require("safetensors.torch", extra="train")
    temporary = out / f".{name}.{os.getpid()}.tmp"
    try:
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        safetensors.save_file(contiguous, temporary)
        # The library makes files that only their owner may read.
        temporary.chmod(stat.S_IMODE((out / _LOCK_NAME).stat().st_mode))
        fsync_path(temporary)
        size, digest = temporary.stat().st_size, sha256_of(temporary)
        entry = {"file": name, **note, "bytes": size, "sha256": digest}
        write_text(_note_of(out, name), _json(entry))
        os.replace(temporary, out / name)
        fsync_path(out)
    finally:
        temporary.unlink(missing_ok=True)


def finished_note(out: Path, name: str) -> dict[str, Any] | None:
    """The note of a file that is there with the size it should have; else ``None``."""
    path, note_path = out / name, _note_of(out, name)
    if not path.is_file() or not note_path.is_file():
        return None
    note = json.loads(note_path.read_text("utf-8"))
    return note if note["bytes"] == path.stat().st_size else None


def finish(out: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest; from now on the folder is a data set."""
    write_text(out / MANIFEST_NAME, _json(manifest))
    for path in [out / UNFINISHED_NAME, *out.glob(".note_*.json")]:
        path.unlink(missing_ok=True)
    fsync_path(out)


def verify(out: Path) -> list[str]:
    """What is wrong with the files of a finished folder, a line each; reads all of them.

    Raises:
        ValueError: it is not finished, or its manifest is damaged.
    """
    manifest = read_manifest(out)
    wrong = _wrong_sizes(out, manifest)
    for entry in all_files(manifest):
        if entry["file"] not in wrong and sha256_of(out / entry["file"]) != entry["sha256"]:
            wrong[entry["file"]] = "has another SHA-256 than the manifest says"
    return [f"{out / name} {reason}" for name, reason in wrong.items()]


def _reopen(out: Path, manifest: dict[str, Any]) -> None:
    """Turn a finished folder with missing files back into an unfinished one."""
    wrong = _wrong_sizes(out, manifest)
    if not wrong:
        return
    write_text(out / UNFINISHED_NAME, _json(manifest["settings"]))
    for entry in all_files(manifest):
        if entry["file"] not in wrong:
            write_text(_note_of(out, entry["file"]), _json(entry))
    (out / MANIFEST_NAME).unlink()


def _wrong_sizes(out: Path, manifest: dict[str, Any]) -> dict[str, str]:
    wrong = {}
    for entry in all_files(manifest):
        path = out / entry["file"]
        if not path.is_file():
            wrong[entry["file"]] = "is missing"
        elif path.stat().st_size != entry["bytes"]:
            wrong[entry["file"]] = f"has {path.stat().st_size} bytes, not {entry['bytes']}"
    return wrong


def _require_same(out: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    if different := differing(saved, asked):
        raise ValueError(
            f"{out} was begun with other settings or another source ({'; '.join(different)}). Use "
            "the same ones, or another folder."
        )


def _note_of(out: Path, name: str) -> Path:
    return out / f".note_{Path(name).stem}.json"


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
