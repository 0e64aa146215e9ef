"""The diffusion loss on held-out scenes: the same noise and timesteps for every model."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from dit_models.data import ImageDataset
from dit_models.drawing import Artist

_SEED = 20_000
_LEVELS = 8


def heldout_loss(
    artist: Artist, dataset: ImageDataset, count: int = 512, batch_size: int = 128
) -> float:
    """Mean loss of the averaged weights over images never trained on, with their captions.

    Each image is seen at 8 timesteps spread evenly over the schedule, with noise that depends on
    its index alone, so that two models differ by their predictions and by nothing else.

    Args:
        artist: the model to judge.
        dataset: a held-out split.
        count: images, the first ones.
        batch_size: images at a time.

    Returns:
        The mean of the objective's loss for each image (``loss_at``; for DDPM with its variational
        term where the variance is learned): what arms of one objective are compared by.
    """
    total = 0.0
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        samples = [dataset.sample(i, np.random.default_rng([_SEED, i])) for i in indices]
        images = torch.stack([sample.image for sample in samples]).to(artist.device)
        noise = _noise(list(indices), images)
        labels = torch.tensor([sample.label for sample in samples], device=artist.device)
        captions = [sample.caption for sample in samples]
        with torch.inference_mode(), artist.autocast():
            condition = artist.model.condition(labels, captions)
            for level in range(_LEVELS):
                timesteps = _timesteps(artist, level, len(images))
                result = artist.objective.loss_at(
                    partial(artist.model, **condition), images, noise, timesteps
                )
                total += float(result.loss.double().sum()) / _LEVELS
    return total / count


def _noise(indices: list[int], images: Tensor) -> Tensor:
    generators = [torch.Generator().manual_seed(_SEED + index) for index in indices]
    shape = images.shape[1:]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(images.device)


def _timesteps(artist: Artist, level: int, count: int) -> Tensor:
    """The middle of the ``level``-th of equal parts of the schedule."""
    middle = (level + 0.5) / _LEVELS * artist.objective.max_timestep
    if artist.objective.max_timestep == 1.0:
        return torch.full((count,), middle, device=artist.device)
    return torch.full((count,), int(middle), dtype=torch.int64, device=artist.device)
