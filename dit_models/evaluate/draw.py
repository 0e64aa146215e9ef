"""Draw many images in batches; image i has seed ``first_seed + i``."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dit_models.drawing import Artist, Prompts
from dit_models.evaluate.processes import Group


def draw_all(
    artist: Artist,
    prompts: Prompts,
    first_seed: int,
    batch_size: int,
    *,
    guidance_scale: float | None = None,
) -> Tensor:
    """One image for each prompt, ``batch_size`` at a time.

    Args:
        artist: the model to draw from.
        prompts: n labels or captions.
        first_seed: seed of the first image, in [0, 2**32 - n].
        batch_size: images a model call; changes an image by rounding only, unless images of a
            batch share their experts (``images_depend_on_batch``).
        guidance_scale: instead of the configured one.

    Returns:
        (n, C, H, W) float32 in [-1, 1], on the CPU.
    """
    batches = []
    for start in range(0, len(prompts), batch_size):
        part = prompts.part(start, start + batch_size)
        seeds = list(range(first_seed + start, first_seed + start + len(part)))
        batches.append(artist.draw(part, seeds, guidance_scale=guidance_scale))
    return torch.cat(batches)


def to_pixels(images: Tensor) -> np.ndarray:
    """(n, C, H, W) in [-1, 1] as (n, H, W, 3) uint8, ``round(127.5·(x + 1))``; grey is repeated.

    Raises:
        ValueError: neither 1 nor 3 channels, or a NaN or infinity.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images have shape {tuple(images.shape)}; expected (n, 1 or 3, H, W). Latents must be "
            "decoded first: give the VAE."
        )
    if not bool(images.isfinite().all()):
        raise ValueError("an image holds NaN or infinity; look at the weights and the sampler.")
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_pixels(pixels: np.ndarray, channels: int) -> Tensor:
    """(n, H, W, 3) uint8 as (n, ``channels``, H, W) float32 in [-1, 1]; grey is the first one."""
    images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
    return images[:, :channels].float() / 127.5 - 1


class Store(Protocol):
    """Where finished images go, a piece (a range of image numbers) at a time."""

    @property
    def pieces(self) -> list[range]: ...

    def has(self, piece: range) -> bool:
        """Whether all images of the piece are there."""
        ...

    def write(self, piece: range, pixels: np.ndarray) -> None:
        """Keep (len(piece), H, W, 3) uint8 images; each file appears whole or not at all."""
        ...


def draw_missing(
    artist: Artist,
    prompts: Prompts,
    store: Store,
    *,
    first_seed: int,
    batch_size: int,
    group: Group,
    stopped: Callable[[], bool],
    progress: Callable[[int], None],
) -> int:
    """Draw this process's share of the pieces that are not there yet.

    Piece p belongs to process ``p % group.size`` whatever is there already, and batches never reach
    over a piece's end, so that the images do not depend on the number of processes.

    Args:
        artist: the model to draw from.
        prompts: one for each image.
        store: knows the pieces and keeps them.
        first_seed: seed of image 0.
        batch_size: images a model call.
        group: the processes that share the work.
        stopped: asked before each piece; True ends the work early.
        progress: called with the number of images of each piece, drawn or found.

    Returns:
        The number of images drawn here.
    """
    drawn = 0
    for piece in store.pieces[group.rank :: group.size]:
        if stopped():
            break
        if not store.has(piece):
            part = prompts.part(piece.start, piece.stop)
            images = draw_all(artist, part, first_seed + piece.start, batch_size)
            store.write(piece, to_pixels(images))
            drawn += len(piece)
        progress(len(piece))
    return drawn
