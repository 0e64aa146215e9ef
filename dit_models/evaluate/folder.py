"""The folder of one drawing job: bound to its settings, filled a piece at a time."""

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dit_models.atomic import write_bytes, write_text
from dit_models.evaluate.adm import NpzImages, write_samples

try:
    import fcntl
except ImportError:  # not on Windows, where two commands in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

SETTINGS_NAME = "settings.json"
SAMPLES_NAME = "samples.npz"
# Start of the name of a folder that is being written.
UNFINISHED = ".writing-"
_LOCK_NAME = ".lock"


def open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder and note its settings, or check that they are the same.

    Unfinished files of a process that was killed are removed: the folder's lock must be held.

    Raises:
        ValueError: the folder holds something else, or images with other settings.
    """
    path = out / SETTINGS_NAME
    if not path.exists():
        if out.exists() and any(entry.name != _LOCK_NAME for entry in out.iterdir()):
            raise ValueError(
                f"{out} is not empty and holds no {SETTINGS_NAME}; choose another --out."
            )
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; choose another --out.") from error
    asked = json.loads(json.dumps(settings))
    different = [
        f"{name} {saved.get(name)!r} there, {asked.get(name)!r} asked"
        for name in {**saved, **asked}
        if saved.get(name) != asked.get(name)
    ]
    if different:
        raise ValueError(
            f"{out} holds images with other settings: {'; '.join(different)}. Choose another --out."
        )
    for pattern in (".*.tmp", "chunks/.*.tmp"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)
    for path in out.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def folder_lock(out: Path) -> Iterator[None]:
    """Hold a folder for this process; the lock ends with the process, however it ends.

    Raises:
        ValueError: when another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / _LOCK_NAME, "w") as stream:
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"another process is writing to {out}; choose another --out or wait."
                ) from error
        yield


class NpzChunks:
    """Chunks of images on their way to ``samples.npz``.

    Args:
        out: the folder.
        count: images in all.
        chunk_size: images a chunk.
    """

    def __init__(self, out: Path, count: int, chunk_size: int) -> None:
        self.out = out
        self.count = count
        self.pieces = [
            range(start, min(start + chunk_size, count)) for start in range(0, count, chunk_size)
        ]

    @property
    def complete(self) -> bool:
        """Whether ``samples.npz`` is there."""
        return (self.out / SAMPLES_NAME).exists()

    def has(self, piece: range) -> bool:
        """Whether the chunk, or the whole file, is there."""
        return self.complete or self._path(piece).exists()

    def write(self, piece: range, pixels: np.ndarray) -> None:
        """Write a chunk in one step."""
        stream = io.BytesIO()
        np.savez(stream, images=pixels)
        write_bytes(self._path(piece), stream.getvalue())

    def assemble(self, labels: np.ndarray | None) -> None:
        """Write ``samples.npz`` from all chunks, and then remove them.

        Raises:
            ValueError: names a chunk that is missing or damaged.
        """
        if not self.complete:
            shape = (self.count, *self._read(self.pieces[0]).shape[1:])
            pieces = (self._read(piece) for piece in self.pieces)
            write_samples(self.out / SAMPLES_NAME, shape, pieces, labels)
        elif len(NpzImages(self.out / SAMPLES_NAME)) != self.count:
            raise ValueError(f"{self.out / SAMPLES_NAME} does not hold {self.count} images.")
        for piece in self.pieces:
            self._path(piece).unlink(missing_ok=True)
        if self._chunks.exists() and not any(self._chunks.iterdir()):
            self._chunks.rmdir()

    @property
    def _chunks(self) -> Path:
        return self.out / "chunks"

    def _path(self, piece: range) -> Path:
        return self._chunks / f"{piece.start:08d}-{piece.stop - 1:08d}.npz"

    def _read(self, piece: range) -> np.ndarray:
        path = self._path(piece)
        try:
            with np.load(path, allow_pickle=False) as file:
                pixels: np.ndarray = file["images"]
        except Exception as error:  # zip, zlib, npy: each has its own
            raise ValueError(
                f"{path} is missing or damaged ({error}); remove it and run the command again."
            ) from error
        if len(pixels) != len(piece):
            raise ValueError(f"{path} holds {len(pixels)} images; expected {len(piece)}.")
        return pixels
