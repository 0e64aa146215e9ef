"""Draw images from a trained model: seeds and conditions in, images out."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_models.conditioned import ConditionedModel
from dit_models.config import DataConfig, SamplingConfig
from dit_models.data import (
    BUILTIN_DATASETS,
    CaptionFolderDataset,
    DatasetInfo,
    ImageDataset,
    build_dataset,
)
from dit_models.diffusion import DDPM, Callback, RectifiedFlow, generate, noise_from_seeds
from dit_models.outputs import DiTOutput


@dataclass(frozen=True)
class Prompts:
    """What to draw: class labels or captions, one for each image."""

    labels: Tensor | None
    captions: list[str] | None

    def __len__(self) -> int:
        given = self.labels if self.labels is not None else self.captions
        return len(given) if given is not None else 0

    def part(self, start: int, end: int) -> "Prompts":
        """Prompts ``start`` to ``end``."""
        labels = None if self.labels is None else self.labels[start:end]
        captions = None if self.captions is None else self.captions[start:end]
        return Prompts(labels, captions)


@dataclass(frozen=True)
class Artist:
    """A model with all that is needed to draw from it.

    Attributes:
        model: usually the averaged weights, in eval mode.
        objective: what it was trained with.
        sampling: sampler, steps and guidance.
        image_shape: (C, H, W) of what the model draws: an image, or latents.
        device: where it runs.
        autocast: makes the precision context of each call.
        decode: makes images (n, C, H, W) of latents; None where the model draws pixels.
    """

    model: ConditionedModel
    objective: RectifiedFlow | DDPM
    sampling: SamplingConfig
    image_shape: tuple[int, int, int]
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    decode: Callable[[Tensor], Tensor] | None = None

    def draw(
        self,
        prompts: Prompts,
        seeds: Sequence[int],
        *,
        guidance_scale: float | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draw one image for each prompt and seed.

        Args:
            prompts: n labels or captions.
            seeds: n seeds in [0, 2**32); an image depends only on its own seed and prompt.
            guidance_scale: instead of the configured one.
            callback: see ``dit_models.diffusion.generate``.

        Returns:
            images (n, C, H, W) float32 on the CPU, in [-1, 1]; latents, as they are, where the
            model draws latents and ``decode`` is None.

        Raises:
            ValueError: when prompts and seeds differ in number, or without the VAE of a model of
                latents.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds; give one for each.")
        scale = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        labels = None if prompts.labels is None else prompts.labels.to(self.device)
        with torch.inference_mode():
            condition = self.model.condition(labels, prompts.captions)
            opposite = self.model.null_condition(len(seeds)) if scale != 1 else None
            images = generate(
                self._predict,
                noise_from_seeds(seeds, self.image_shape, self.device),
                objective=self.objective,
                sampler=self.sampling.sampler,
                num_steps=self.sampling.num_steps,
                cond=condition,
                uncond=opposite,
                guidance_scale=scale,
                guidance_interval=(self.sampling.guidance_start, self.sampling.guidance_end),
                guidance_channels=self.sampling.guidance_channels,
                seeds=seeds,
                clip_range=self.sampling.clip_range,
                callback=callback,
            )
            if self.decode is not None:
                images = self.decode(images)
        return images.clamp(-1, 1).cpu() if self.draws_pixels else images.cpu()

    @property
    def draws_pixels(self) -> bool:
        """Whether ``draw`` returns images, and not the latents of a VAE that nobody named."""
        return self.decode is not None or self.image_shape[0] in (1, 3)

    def _predict(self, x: Tensor, timesteps: Tensor, **condition: Tensor) -> DiTOutput:
        with self.autocast():
            return self.model(x, timesteps, **condition)


def example_prompts(info: DatasetInfo, data: DataConfig, count: int) -> Prompts:
    """The prompts of a grid: classes in turn, or captions (unseen ones for embedded data)."""
    if info.num_classes:
        return Prompts(torch.arange(count) % info.num_classes, None)
    split = "heldout" if data.name in BUILTIN_DATASETS else data.split
    dataset = build_dataset(data.name, split=split, image_size=data.image_size)
    return Prompts(None, captions_of(dataset, count))


def captions_of(dataset: ImageDataset, count: int) -> list[str]:
    """The captions of the first ``count`` samples; a shorter data set starts over."""
    indices = [index % len(dataset) for index in range(count)]
    if isinstance(dataset, CaptionFolderDataset):
        return [dataset.captions[index] for index in indices]  # without decoding the images
    return [dataset.sample(index, np.random.default_rng(0)).caption for index in indices]
