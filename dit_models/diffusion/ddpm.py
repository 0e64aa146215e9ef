"""Denoising diffusion with a linear schedule and a learned variance."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dit_models.diffusion.objective import (
    LossOutput,
    OutputT,
    check_images,
    check_noise,
    check_timesteps,
    image_mean,
    noise_like,
)


class Coefficients(NamedTuple):
    """Schedule values of a batch of timesteps, each (B, 1, 1, 1)."""

    data_scale: Tensor  # sqrt(alpha_bar_t)
    noise_scale: Tensor  # sqrt(1 - alpha_bar_t)
    posterior_data: Tensor  # weight of x_0 in the mean of q(x_{t-1} | x_t, x_0)
    posterior_noisy: Tensor  # weight of x_t in the same mean
    log_beta: Tensor
    log_beta_tilde: Tensor  # log variance of q(x_{t-1} | x_t, x_0)


def gaussian_kl(mean_q: Tensor, log_var_q: Tensor, mean_p: Tensor, log_var_p: Tensor) -> Tensor:
    """Elementwise ``KL(N(mean_q, exp(log_var_q)) || N(mean_p, exp(log_var_p)))`` in nats."""
    ratio = torch.exp(log_var_q - log_var_p)
    distance = (mean_q - mean_p).square() * torch.exp(-log_var_p)
    return 0.5 * (log_var_p - log_var_q + ratio + distance - 1)


def discretized_gaussian_nll(images: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Elementwise ``-log`` probability, in nats, of 8-bit values under a Gaussian.

    ``P(x) = Phi((x + 1/255 - mean)/sigma) - Phi((x - 1/255 - mean)/sigma)``, the first and the
    last of the 256 bins of [-1, 1] reaching to minus and plus infinity. Values outside [-1, 1]
    (latents) count as the outer bins. Source: DDPM (arXiv 2006.11239, eq. 13).
    """
    inverse_std = torch.exp(-0.5 * log_var)
    upper = (images + 1 / 255 - mean) * inverse_std
    lower = (images - 1 / 255 - mean) * inverse_std
    # Far in the upper tail both Phi round to 1; mirrored into the lower one they keep digits.
    mirror = lower + upper > 0
    high = torch.where(mirror, -lower, upper)
    low = torch.where(mirror, -upper, lower)
    log_high = torch.special.log_ndtr(high)
    # A very wide Gaussian makes the two equal in floating point: the floor keeps log finite there.
    gap = (log_high - torch.special.log_ndtr(low)).clamp(min=torch.finfo(images.dtype).tiny)
    log_prob = log_high + torch.log(-torch.expm1(-gap))
    # The centres of the outer bins are -1 and 1, their neighbours 2/255 away.
    log_prob = torch.where(images < -0.999, torch.special.log_ndtr(upper), log_prob)
    log_prob = torch.where(images > 0.999, torch.special.log_ndtr(-lower), log_prob)
    return -log_prob


class DDPM:
    """Noise prediction with linear betas and, by default, a learned variance.

    ``x_t = sqrt(alpha_bar_t)·data + sqrt(1 - alpha_bar_t)·noise``, t = 0 .. num_timesteps - 1. The
    loss is the hybrid of Improved DDPM (arXiv 2102.09672, eq. 15-17)::

        loss = mean((noise - predicted)^2) + vb_weight · num_timesteps · L_t

    L_t is the term of the variational bound at the drawn t, in **bits per dimension**, with the
    predicted mean detached; num_timesteps · L_t is the unbiased estimate of the whole bound L_vlb,
    so vb_weight is lambda of eq. 16. At the defaults lambda · num_timesteps is 1: the same weight
    as the "num_timesteps / 1000" convention of the DiT family. The variance is
    ``exp(v·log beta_t + (1 - v)·log beta_tilde_t)``, v = (raw + 1)/2 with raw the second half of
    the prediction (raw in [-1, 1] spans the range, as in diffusers' "learned_range").
    beta_tilde_0 is 0, so its logarithm is replaced by that of beta_tilde_1.

    diffusers' DDPMScheduler is not used here: it keeps its schedule in float32 (its
    1 - alpha_bar_0 is off by 2e-4), and has neither the posterior of q nor the bound. The "ddpm"
    sampler does use it.

    Args:
        num_timesteps: length of the training schedule, at least 2.
        beta_start, beta_end: first and last beta, 0 < beta_start <= beta_end < 1.
        learned_sigma: the model predicts 2C channels, the second half for the variance.
        vb_weight: lambda of eq. 16, used when learned_sigma.

    Raises:
        ValueError: an argument outside the ranges above.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
        learned_sigma: bool = True,
        vb_weight: float = 1e-3,
    ) -> None:
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, got {num_timesteps}")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                "betas must satisfy 0 < beta_start <= beta_end < 1, "
                f"got beta_start={beta_start}, beta_end={beta_end}"
            )
        if vb_weight < 0:
            raise ValueError(f"vb_weight must be >= 0, got {vb_weight}")
        self.num_timesteps = num_timesteps
        self.learned_sigma = learned_sigma
        self.vb_weight = vb_weight
        self.max_timestep = float(num_timesteps)
        self.betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self._tables = {(torch.device("cpu"), torch.float64): self._build_table()}

    def _build_table(self) -> Tensor:
        """(num_timesteps, 6) float64, a column for each field of ``Coefficients``."""
        alpha_bar = self.alphas_cumprod
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        beta_tilde = self.betas * (1 - previous) / (1 - alpha_bar)
        beta_tilde[0] = beta_tilde[1]
        columns = Coefficients(
            data_scale=alpha_bar.sqrt(),
            noise_scale=(1 - alpha_bar).sqrt(),
            posterior_data=previous.sqrt() * self.betas / (1 - alpha_bar),
            posterior_noisy=(1 - self.betas).sqrt() * (1 - previous) / (1 - alpha_bar),
            log_beta=self.betas.log(),
            log_beta_tilde=beta_tilde.log(),
        )
        return torch.stack(columns, dim=1)

    def coefficients(self, timesteps: Tensor, dtype: torch.dtype) -> Coefficients:
        """Schedule values at ``timesteps`` (B,) int64, each (B, 1, 1, 1) of ``dtype``."""
        key = (timesteps.device, dtype)
        if key not in self._tables:
            table = self._tables[(torch.device("cpu"), torch.float64)]
            self._tables[key] = table.to(device=timesteps.device, dtype=dtype)
        rows = self._tables[key][timesteps]  # (B, 6)
        return Coefficients(*(column.view(-1, 1, 1, 1) for column in rows.unbind(dim=1)))

    def prediction_channels(self, in_channels: int) -> int:
        """Channels of a prediction for images of ``in_channels`` channels: 2C if learned_sigma."""
        return 2 * in_channels if self.learned_sigma else in_channels

    def prediction(self, sample: Tensor, in_channels: int) -> Tensor:
        """A model's ``sample``, checked to have ``prediction_channels(in_channels)`` channels.

        Raises:
            ValueError: it has another number of channels.
        """
        expected = self.prediction_channels(in_channels)
        if sample.shape[1] != expected:
            raise ValueError(
                f"DDPM with learned_sigma={self.learned_sigma} needs a prediction of {expected} "
                f"channels for images of {in_channels}, got {sample.shape[1]}"
            )
        return sample

    def sample_timesteps(
        self, batch_size: int, generator: torch.Generator | None, device: torch.device
    ) -> Tensor:
        """Uniform random (B,) int64 timesteps in [0, num_timesteps)."""
        draw_device = device if generator is None else generator.device
        return torch.randint(
            self.num_timesteps, (batch_size,), generator=generator, device=draw_device
        ).to(device)

    def sampling_timesteps(self, num_steps: int) -> list[int]:
        """``num_steps`` timesteps, evenly spaced from num_timesteps - 1 down to 0 and rounded.

        The respacing of Improved DDPM (arXiv 2102.09672, section 4). A single step stands at
        num_timesteps - 1.

        Raises:
            ValueError: more steps than the schedule has.
        """
        last = self.num_timesteps - 1
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(
                f"num_steps must be between 1 and num_timesteps={self.num_timesteps}, "
                f"got {num_steps}"
            )
        if num_steps == 1:
            return [last]
        return [round(last * step / (num_steps - 1)) for step in range(num_steps - 1, -1, -1)]

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``sqrt(alpha_bar_t)·images + sqrt(1 - alpha_bar_t)·noise``, timesteps (B,) int64."""
        c = self.coefficients(timesteps, images.dtype)
        return c.data_scale * images + c.noise_scale * noise

    def predict_data(self, noisy: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The x_0 that ``noisy`` = x_t and its ``noise`` imply (the inverse of ``add_noise``)."""
        c = self.coefficients(timesteps, noisy.dtype)
        return (noisy - c.noise_scale * noise) / c.data_scale

    def posterior(self, images: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) and log variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x_0).

        DDPM (arXiv 2006.11239, eq. 7). At t = 0 the mean is x_0 and the log variance that of t = 1.
        """
        c = self.coefficients(timesteps, noisy.dtype)
        return c.posterior_data * images + c.posterior_noisy * noisy, c.log_beta_tilde

    def log_variance(self, raw: Tensor, timesteps: Tensor) -> Tensor:
        """Log variance (B, C, H, W) of p(x_{t-1} | x_t) from the raw second half (eq. 15)."""
        c = self.coefficients(timesteps, raw.dtype)
        fraction = (raw + 1) / 2
        return fraction * c.log_beta + (1 - fraction) * c.log_beta_tilde

    def variational_bound(
        self,
        images: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        raw: Tensor,
        pixel_weights: Tensor | None = None,
    ) -> Tensor:
        """(B,) term of the variational bound at each image's timestep, in bits per dimension.

        ``KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))`` for t > 0 and ``-log p(x_0 | x_1)`` of
        8-bit values for t = 0 (arXiv 2102.09672, eq. 4-6).

        Args:
            images: (B, C, H, W) x_0.
            noisy: (B, C, H, W) x_t.
            timesteps: (B,) int64.
            noise: (B, C, H, W) predicted noise.
            raw: (B, C, H, W) second half of the prediction.
            pixel_weights: (B, 1, H, W) of 0 and 1; pixels of weight 0 are left out of the mean.
        """
        mean_q, log_var_q = self.posterior(images, noisy, timesteps)
        mean_p, _ = self.posterior(self.predict_data(noisy, noise, timesteps), noisy, timesteps)
        log_var_p = self.log_variance(raw, timesteps)
        kl = image_mean(gaussian_kl(mean_q, log_var_q, mean_p, log_var_p), pixel_weights)
        nll = image_mean(discretized_gaussian_nll(images, mean_p, log_var_p), pixel_weights)
        return torch.where(timesteps == 0, nll, kl) / math.log(2)

    def target(self, images: Tensor, noise: Tensor) -> Tensor:
        """What the model learns to predict: the noise."""
        return noise

    def loss(
        self,
        denoise: Callable[[Tensor, Tensor], OutputT],
        images: Tensor,
        generator: torch.Generator | None = None,
    ) -> LossOutput[OutputT]:
        """Hybrid loss at random timesteps and noise (the formula is in the class docstring).

        Args:
            denoise: called as ``denoise(x_t (B, C, H, W), timesteps (B,) float32)``.
            images: (B, C, H, W) float32.
            generator: source of timesteps and noise, on any device.

        Returns:
            ``LossOutput``; its timesteps are whole numbers as float32.

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
        """``loss`` at given noise (like images) and timesteps (B,) int64.

        With ``pixel_weights`` (B, 1, H, W), 0 or 1, it is the mean over the pixels of weight 1.
        """
        check_images(images)
        check_noise(images, noise)
        check_timesteps(timesteps, images.shape[0], integer=True)
        noisy = self.add_noise(images, noise, timesteps)
        output = denoise(noisy, timesteps.float())
        channels = images.shape[1]
        prediction = self.prediction(output.sample, channels).to(images.dtype)
        predicted_noise = prediction[:, :channels]
        loss = image_mean((predicted_noise - noise).square(), pixel_weights)
        if self.learned_sigma:
            bound = self.variational_bound(
                images,
                noisy,
                timesteps,
                predicted_noise.detach(),
                prediction[:, channels:],
                pixel_weights,
            )
            loss = loss + self.vb_weight * self.num_timesteps * bound
        return LossOutput(loss, output, timesteps.float())
