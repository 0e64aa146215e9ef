"""What the training objectives share: types of output and loss, and input checks."""

from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor


class HasSample(Protocol):
    """Anything a denoiser may return: ``sample`` is the (B, C_out, H, W) prediction."""

    @property
    def sample(self) -> Tensor: ...


OutputT = TypeVar("OutputT", bound=HasSample)


class LossOutput(NamedTuple, Generic[OutputT]):
    """Loss of a batch.

    Attributes:
        loss: (B,) one value an image, so that weights and per-timestep plots need no second pass.
        output: what the denoiser returned, whole, so that routing plans reach the trainer.
        timesteps: (B,) float32, the timesteps given to the denoiser.
    """

    loss: Tensor
    output: OutputT
    timesteps: Tensor


def check_images(images: Tensor) -> None:
    """Raise ``ValueError`` unless ``images`` is (B, C, H, W) in float32 or float64."""
    if images.dim() != 4:
        raise ValueError(f"images must be (B, C, H, W), got shape {tuple(images.shape)}")
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"images must be float32 or float64, got {images.dtype}: the noised image and the loss "
            "are computed in this dtype (run the model itself under autocast)"
        )


def check_noise(images: Tensor, noise: Tensor) -> None:
    """Raise ``ValueError`` unless ``noise`` has the shape, dtype and device of ``images``."""
    given = (tuple(noise.shape), noise.dtype, noise.device)
    expected = (tuple(images.shape), images.dtype, images.device)
    if given != expected:
        raise ValueError(f"noise must be like images {expected}, got {given}")


def check_timesteps(timesteps: Tensor, batch_size: int, *, integer: bool) -> None:
    """Raise ``ValueError`` unless ``timesteps`` is (B,) int64 (or floating point)."""
    kind = "int64" if integer else "floating point"
    right_kind = timesteps.dtype == torch.int64 if integer else timesteps.is_floating_point()
    if timesteps.shape != (batch_size,) or not right_kind:
        raise ValueError(
            f"timesteps must be ({batch_size},) {kind}, "
            f"got {tuple(timesteps.shape)} {timesteps.dtype}"
        )


def noise_like(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise like ``images``, drawn on the generator's device."""
    device = images.device if generator is None else generator.device
    noise = torch.randn(images.shape, generator=generator, device=device, dtype=images.dtype)
    return noise.to(images.device)


def image_mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """(B,) mean of values (B, C, H, W), over the pixels where weights (B, 1, H, W) is 1.

    ``None`` is every pixel. An image without such a pixel has the mean 0.
    """
    if weights is None:
        return values.mean(dim=(1, 2, 3))
    # A hidden patch holds no prediction: 0 times what is not finite there would not be 0.
    held = torch.where(weights > 0, values, torch.zeros_like(values))
    count = weights.sum(dim=(1, 2, 3)) * values.shape[1]
    return held.sum(dim=(1, 2, 3)) / count.clamp(min=1)


def expand_to(values: Tensor, images: Tensor) -> Tensor:
    """(B,) values as (B, 1, 1, 1) in the dtype of ``images``."""
    return values.to(images.dtype).view(-1, 1, 1, 1)
