"""Classifier-free guidance."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dit_models.diffusion.objective import HasSample


class Denoised(NamedTuple):
    """What a guided denoiser returns.

    Attributes:
        sample: (B, C_out, H, W) prediction after guidance, in the dtype of the noisy image.
        model_output: what the model returned; where guidance was active its batch is 2B, the B
            conditional images first.
    """

    sample: Tensor
    model_output: HasSample


def _check_branches(cond: Mapping[str, Tensor], uncond: Mapping[str, Tensor]) -> None:
    given = {name: tuple(value.shape) for name, value in cond.items()}
    opposed = {name: tuple(value.shape) for name, value in uncond.items()}
    if given != opposed:
        raise ValueError(
            "cond and uncond must have the same names and shapes (pad text to one length), "
            f"got cond {given} and uncond {opposed}"
        )


def guided(
    model_fn: Callable[..., HasSample],
    cond: Mapping[str, Tensor] | None = None,
    uncond: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
    *,
    max_timestep: float = 1.0,
) -> Callable[[Tensor, float], Denoised]:
    """A denoiser with classifier-free guidance, ``u + scale·(c - u)``.

    Both branches run in one forward of 2B images. Where guidance is inactive (scale 1, or a noise
    level outside the interval) only the conditional branch runs. Channels that are not guided, and
    the variance half of a prediction with twice the image's channels, are the conditional branch's.
    The timestep is a Python float, so that the choice of branch never waits for the device.
    Sources: Ho and Salimans (arXiv 2207.12598, eq. 6); Kynkäänniemi et al. (arXiv 2404.07724) for
    the interval.

    Args:
        model_fn: called as ``model_fn(x (B, C, H, W), timesteps (B,) float32, **cond)``.
        cond: keyword tensors of the conditional branch, each with B rows.
        uncond: the same keywords for the other branch; needed unless scale is 1.
        scale: guidance scale; 1 is none.
        interval: (low, high), both included, of the noise level ``timestep / max_timestep`` in
            [0, 1] (1 is pure noise) where guidance is active.
        channels: guide only the first ``channels`` channels (the published DDPM samples of DiT
            models guide 3 of 4 latent channels); None guides all of the image's channels.
        max_timestep: the timestep of noise level 1: 1 for rectified flow, num_timesteps for DDPM.

    Returns:
        ``denoise(x, timestep: float) -> Denoised``.

    Raises:
        ValueError: cond and uncond differ in names or shapes, uncond is missing, the interval is
            not within [0, 1], or (when called) a batch size or channel count does not fit.
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"interval must satisfy 0 <= low <= high <= 1, got {interval}")
    if channels is not None and channels < 1:
        raise ValueError(f"channels must be at least 1 or None, got {channels}")
    cond = dict(cond or {})
    both: dict[str, Tensor] = {}
    if scale != 1:
        if uncond is None:
            raise ValueError(f"guidance scale {scale} needs uncond; give it or use scale 1")
        _check_branches(cond, uncond)
        both = {name: torch.cat([value, uncond[name]]) for name, value in cond.items()}

    def denoise(x: Tensor, timestep: float) -> Denoised:
        batch_size, in_channels = x.shape[:2]
        for name, value in cond.items():
            if value.shape[0] != batch_size:
                raise ValueError(
                    f"cond[{name!r}] has {value.shape[0]} rows for a batch of {batch_size} images"
                )
        if scale == 1 or not low <= timestep / max_timestep <= high:
            timesteps = torch.full((batch_size,), timestep, dtype=torch.float32, device=x.device)
            output = model_fn(x, timesteps, **cond)
            return Denoised(output.sample.to(x.dtype), output)

        num_guided = in_channels if channels is None else channels
        if num_guided > in_channels:
            raise ValueError(f"channels={channels} is more than the image's {in_channels}")
        timesteps = torch.full((2 * batch_size,), timestep, dtype=torch.float32, device=x.device)
        output = model_fn(torch.cat([x, x]), timesteps, **both)
        c, u = output.sample.to(x.dtype).chunk(2)
        mixed = u[:, :num_guided] + scale * (c[:, :num_guided] - u[:, :num_guided])
        return Denoised(torch.cat([mixed, c[:, num_guided:]], dim=1), output)

    return denoise
