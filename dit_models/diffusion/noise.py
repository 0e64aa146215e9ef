"""Noise that depends on an image's own seed and on nothing else."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _generator(seed: int) -> torch.Generator:
    # torch's CPU generator keeps 32 bits of its seed: 5 and 5 + 2**32 would be the same image.
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"a seed must be an int in [0, 2**32), got {seed!r}")
    return torch.Generator().manual_seed(seed)


def _draw(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def noise_from_seeds(
    seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise, each image from its own seed.

    Drawn on the CPU, so that an image is the same whatever the device, the batch size and its
    neighbours.

    Args:
        seeds: B seeds in [0, 2**32).
        shape: (C, H, W).
        device: where the result goes.

    Returns:
        (B, C, H, W) float32.

    Raises:
        ValueError: no seeds, or a seed out of range.
    """
    if not seeds:
        raise ValueError("seeds is empty; give one seed for each image")
    return _draw([_generator(seed) for seed in seeds], shape).to(device)


class StepNoise:
    """Noise for the steps of a stochastic sampler, again each image from its own seed.

    The stream of an image goes on where ``noise_from_seeds`` stopped, so that the first step's
    noise is not the initial noise once more.

    Args:
        seeds: B seeds in [0, 2**32).
        shape: (C, H, W), as given to ``noise_from_seeds``.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int]) -> None:
        self.generators = [_generator(seed) for seed in seeds]
        self.shape = shape
        _draw(self.generators, shape)

    def draw(self, device: torch.device) -> Tensor:
        """The next (B, C, H, W) float32 standard normal noise."""
        return _draw(self.generators, self.shape).to(device)
