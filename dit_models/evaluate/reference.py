"""The real images that generated ones are compared with: an ADM reference file, or a folder."""

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dit_models.atomic import sha256_of
from dit_models.data.folders import IMAGE_SUFFIXES, read_image
from dit_models.evaluate.adm import NpzImages
from dit_models.evaluate.draw import to_pixels
from dit_models.evaluate.inception import POOL_SIZE, SPATIAL_SIZE
from dit_models.quality.frechet import Moments


class FolderImages:
    """All images below a folder, in the order of their paths, read a batch at a time.

    Each is cut to its central square and resized (Lanczos), as the data sets do.

    Args:
        path: the folder.
        side: height and width to resize to.

    Raises:
        ValueError: no images.
    """

    def __init__(self, path: Path, side: int) -> None:
        self.path = path
        self.side = side
        self.files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise ValueError(
                f"{path} has no images; expected files ending in {', '.join(IMAGE_SUFFIXES)}."
            )

    def __len__(self) -> int:
        return len(self.files)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.side, self.side

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """uint8 (batch_size or, at the end, fewer, H, W, 3)."""
        for start in range(0, len(self), batch_size):
            files = self.files[start : start + batch_size]
            yield to_pixels(torch.stack([read_image(file, self.side) for file in files]))


class Reference:
    """Moments and images of the real set, as far as they are given.

    Args:
        path: ADM's ``.npz`` (``mu``, ``sigma`` of the pool features, ``mu_s``, ``sigma_s`` of the
            spatial ones, and/or images ``arr_0``), or a folder of images.
        size: (H, W) of the generated images.

    Attributes:
        pool, spatial: given moments, or None.
        images: given images, or None.

    Raises:
        ValueError: nothing of the sort there, or images of another size.
    """

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self.path = path
        self.pool: Moments | None = None
        self.spatial: Moments | None = None
        self.images: NpzImages | FolderImages | None = None
        if path.is_dir():
            if size[0] != size[1]:
                raise ValueError(f"a folder of images needs square samples; they are {size}.")
            self.images = FolderImages(path, size[0])
            return
        try:
            with np.load(path, allow_pickle=False) as file:
                names = set(file.files)
                self.pool = _moments(file, "mu", "sigma", POOL_SIZE)
                self.spatial = _moments(file, "mu_s", "sigma_s", SPATIAL_SIZE)
        except (OSError, zipfile.BadZipFile, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"--reference {path} cannot be read: {error}; expected an ADM reference .npz or a "
                "folder of images."
            ) from error
        if "arr_0" in names:
            self.images = NpzImages(path)
            if self.images.size != size:
                raise ValueError(
                    f"the images of {path} are {self.images.size}, the samples {size}; expected "
                    "one size."
                )
        if self.images is None and self.pool is None:
            raise ValueError(
                f"{path} holds {', '.join(sorted(names))}; expected mu and sigma, or arr_0."
            )

    def identity(self) -> str:
        """Digest of the file; for a folder of the names and sizes of its images."""
        if isinstance(self.images, FolderImages):
            listing = [f"{f.relative_to(self.path)} {f.stat().st_size}" for f in self.images.files]
            return hashlib.sha256("\n".join(listing).encode()).hexdigest()
        return sha256_of(self.path)


def _moments(file: np.lib.npyio.NpzFile, mean: str, covariance: str, width: int) -> Moments | None:
    if mean not in file.files or covariance not in file.files:
        return None
    values = [torch.from_numpy(np.asarray(file[name], np.float64)) for name in (mean, covariance)]
    if values[0].shape != (width,) or values[1].shape != (width, width):
        raise ValueError(
            f"{mean} and {covariance} have shapes {tuple(values[0].shape)} and "
            f"{tuple(values[1].shape)}; expected ({width},) and ({width}, {width})"
        )
    return Moments(*values)
