"""Sample files in ADM's format: ``arr_0`` images, ``arr_1`` labels; written and read in pieces."""

import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from dit_models.atomic import fsync_path


def write_samples(
    path: Path, shape: tuple[int, int, int, int], pieces: Iterable[np.ndarray],
    labels: np.ndarray | None,
) -> None:  # fmt: skip
    """Write ``samples.npz`` without ever holding all images.

    Args:
        path: the file; it appears whole or not at all.
        shape: (n, H, W, 3) of all images together.
        pieces: uint8 arrays (any number, H, W, 3), in order.
        labels: (n,) integers, kept as int64 ``arr_1``; None leaves it out, as for captions.

    Raises:
        ValueError: the pieces are not ``shape`` together, or not uint8.

    Source: the format that guided-diffusion's evaluator reads (ADM, arXiv 2105.05233).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                _write_images(stream, shape, pieces)
            if labels is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as stream:
                    npy.write_array(stream, np.asarray(labels, np.int64), allow_pickle=False)
        fsync_path(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def _write_images(
    stream: IO[bytes], shape: tuple[int, int, int, int], pieces: Iterable[np.ndarray]
) -> None:
    header = {"descr": npy.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False,
              "shape": shape}  # fmt: skip
    npy.write_array_header_1_0(stream, header)
    count = 0
    for piece in pieces:
        if piece.dtype != np.uint8 or piece.shape[1:] != shape[1:]:
            raise ValueError(
                f"images of {piece.shape[1:]} {piece.dtype}; expected {shape[1:]} uint8"
            )
        stream.write(np.ascontiguousarray(piece).data)
        count += len(piece)
    if count != shape[0]:
        raise ValueError(f"there are {count} images; expected {shape[0]}")


class NpzImages:
    """The images ``arr_0`` of an ``.npz``, read a batch at a time.

    Args:
        path: the file.

    Attributes:
        shape: (n, H, W, 3).

    Raises:
        ValueError: not such a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
                shape, fortran, dtype = _read_header(stream)
        except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} holds no images arr_0: {error}; expected ADM's format"
            ) from error
        if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or fortran:
            raise ValueError(
                f"arr_0 of {path} is {shape} {dtype}; expected (n, H, W, 3) uint8 in C order"
            )
        self.shape = shape

    def __len__(self) -> int:
        return int(self.shape[0])

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.shape[1], self.shape[2]

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """uint8 (batch_size or, at the end, fewer, H, W, 3).

        Raises:
            ValueError: when the file ends early or its checksum is wrong.
        """
        bytes_each = int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
                _read_header(stream)
                for start in range(0, len(self), batch_size):
                    count = min(batch_size, len(self) - start)
                    data = stream.read(count * bytes_each)
                    yield np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype
