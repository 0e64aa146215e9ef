"""Rectified flow: the straight path between data and noise, and its velocity."""

from collections.abc import Callable

import torch
from torch import Tensor

from dit_models.diffusion.objective import (
    LossOutput,
    OutputT,
    check_images,
    check_noise,
    check_timesteps,
    expand_to,
    image_mean,
    noise_like,
)

TIMESTEP_DISTRIBUTIONS = ("logit_normal", "uniform")


class RectifiedFlow:
    """Rectified flow with logit-normal timesteps.

    ``x_t = (1 - t)·data + t·noise``; the model predicts ``noise - data``; t = 1 is pure noise.
    Sources: Liu et al. (arXiv 2209.03003, eq. 1); Esser et al. (arXiv 2403.03206, eq. 19) for the
    logit-normal ``t = sigmoid(mean + std·N(0, 1))``; EC-DiT and DiT-MoE train with mean 0, std 1.

    Args:
        mean: location of the logit-normal; negative favours clean images.
        std: scale of the logit-normal, > 0.
        timestep_distribution: "logit_normal", or "uniform" on [0, 1), which ignores mean and std.

    Raises:
        ValueError: unknown distribution, or std not positive.
    """

    max_timestep = 1.0

    def __init__(
        self,
        mean: float = 0.0,
        std: float = 1.0,
        timestep_distribution: str = "logit_normal",
    ) -> None:
        if timestep_distribution not in TIMESTEP_DISTRIBUTIONS:
            raise ValueError(
                f"timestep_distribution must be one of {TIMESTEP_DISTRIBUTIONS}, "
                f"got {timestep_distribution!r}"
            )
        if std <= 0:
            raise ValueError(f"std must be > 0, got {std}")
        self.mean = mean
        self.std = std
        self.timestep_distribution = timestep_distribution

    def prediction_channels(self, in_channels: int) -> int:
        """Channels of a prediction for images of ``in_channels`` channels: the same number."""
        return in_channels

    def prediction(self, sample: Tensor, in_channels: int) -> Tensor:
        """Velocity (B, C, H, W) in a model's ``sample``.

        A model built for a learned variance predicts 2C channels; rectified flow has no use for
        the second half and drops it (so do the published DiT-MoE flow models).

        Raises:
            ValueError: sample has neither C nor 2C channels.
        """
        if sample.shape[1] not in (in_channels, 2 * in_channels):
            raise ValueError(
                f"rectified flow needs a prediction of {in_channels} or {2 * in_channels} channels "
                f"for images of {in_channels}, got {sample.shape[1]}"
            )
        return sample[:, :in_channels]

    def sample_timesteps(
        self, batch_size: int, generator: torch.Generator | None, device: torch.device
    ) -> Tensor:
        """Random (B,) float32 timesteps in [0, 1]."""
        draw = torch.rand if self.timestep_distribution == "uniform" else torch.randn
        draw_device = device if generator is None else generator.device
        values = draw(batch_size, generator=generator, device=draw_device)
        if self.timestep_distribution == "logit_normal":
            values = torch.sigmoid(self.mean + self.std * values)
        return values.to(device)

    def sampling_timesteps(self, num_steps: int) -> list[float]:
        """The ``num_steps`` uniform timesteps 1, 1 - 1/N, ..., 1/N at which a sampler stands."""
        return [step / num_steps for step in range(num_steps, 0, -1)]

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``x_t = (1 - t)·images + t·noise`` with t (B,) in [0, 1]."""
        t = expand_to(timesteps, images)
        return (1 - t) * images + t * noise

    def target(self, images: Tensor, noise: Tensor) -> Tensor:
        """What the model learns to predict: the velocity ``noise - images``."""
        return noise - images

    def loss(
        self,
        denoise: Callable[[Tensor, Tensor], OutputT],
        images: Tensor,
        generator: torch.Generator | None = None,
    ) -> LossOutput[OutputT]:
        """Flow-matching loss at random timesteps and noise.

        Args:
            denoise: called as ``denoise(x_t (B, C, H, W), timesteps (B,))``.
            images: (B, C, H, W) float32.
            generator: source of timesteps and noise, on any device.

        Returns:
            ``LossOutput`` with the (B,) mean squared error of the velocity.

        Raises:
            ValueError: images or the prediction have the wrong shape or dtype.
        """
        check_images(images)
        timesteps = self.sample_timesteps(images.shape[0], generator, images.device)
        return self.loss_at(denoise, images, noise_like(images, generator), timesteps)

    def loss_at(
        self,
        denoise: Callable[[Tensor, Tensor], OutputT],
        images: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        pixel_weights: Tensor | None = None,
    ) -> LossOutput[OutputT]:
        """``loss`` at given noise (like images) and timesteps (B,) float.

        With ``pixel_weights`` (B, 1, H, W), 0 or 1, it is the mean over the pixels of weight 1.
        """
        check_images(images)
        check_noise(images, noise)
        check_timesteps(timesteps, images.shape[0], integer=False)
        output = denoise(self.add_noise(images, noise, timesteps), timesteps)
        velocity = self.prediction(output.sample, images.shape[1]).to(images.dtype)
        loss = image_mean((velocity - (noise - images)).square(), pixel_weights)
        return LossOutput(loss, output, timesteps)
