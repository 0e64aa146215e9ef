"""From noise to images: Euler and Heun for rectified flow, DDPM and DDIM for diffusion.

Euler and DDPM are stepped by diffusers' schedulers. Heun and DDIM are written out, because
diffusers' versions do something else: the comments beside them say what.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_models.diffusion.ddpm import DDPM
from dit_models.diffusion.flow import RectifiedFlow
from dit_models.diffusion.guidance import guided
from dit_models.diffusion.noise import StepNoise
from dit_models.diffusion.objective import HasSample
from dit_models.extras import require

FLOW_SAMPLERS = ("euler", "heun")
DIFFUSION_SAMPLERS = ("ddpm", "ddim")

# (step, timestep, x_t given to the model, what the model returned)
Callback = Callable[[int, float, Tensor, Any], None]


class _Predict(Protocol):
    """Prediction at (x, timestep); reports to the callback when it opens a step."""

    def __call__(self, x: Tensor, timestep: float, step: int | None = None) -> Tensor: ...


def _clip_velocity(velocity: Tensor, x: Tensor, t: float, clip_range: float | None) -> Tensor:
    """The velocity that points at the clipped ``x_0 = x - t·velocity``."""
    if clip_range is None:
        return velocity
    return (x - (x - t * velocity).clamp(-clip_range, clip_range)) / t


def _euler(
    predict: _Predict,
    x: Tensor,
    timesteps: list[float],
    steps: Iterable[int],
    clip_range: float | None,
) -> Tensor:
    module = require("diffusers.schedulers.scheduling_flow_match_euler_discrete", extra="train")
    scheduler = module.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)
    # Left alone it would spread its steps over 1 .. 1/num_train_timesteps and then jump to 0.
    scheduler.set_timesteps(sigmas=timesteps)
    scheduler.set_begin_index(0)
    for step in steps:
        t = timesteps[step]
        velocity = _clip_velocity(predict(x, t, step), x, t, clip_range)
        x = scheduler.step(velocity, t, x, return_dict=False)[0]
    return x


def _heun(
    predict: _Predict,
    x: Tensor,
    timesteps: list[float],
    steps: Iterable[int],
    clip_range: float | None,
) -> Tensor:
    # FlowMatchHeunDiscreteScheduler accepts no grid: it spreads its steps over 1 ..
    # 1/num_train_timesteps and then jumps to 0. It also rebuilds the velocity as (x - (x - t·v))/t,
    # which loses digits. As there, the last step is an Euler step: models hardly see t = 0.
    for step in steps:
        t = timesteps[step]
        velocity = _clip_velocity(predict(x, t, step), x, t, clip_range)
        if step + 1 == len(timesteps):
            return x - t * velocity
        t_next = timesteps[step + 1]
        x_next = x + (t_next - t) * velocity
        velocity_next = _clip_velocity(predict(x_next, t_next), x_next, t_next, clip_range)
        x = x + (t_next - t) * 0.5 * (velocity + velocity_next)
    return x


def _ddpm(
    predict: _Predict,
    x: Tensor,
    objective: DDPM,
    timesteps: list[int],
    steps: Iterable[int],
    clip_range: float | None,
    noise: StepNoise,
) -> Tensor:
    module = require("diffusers.schedulers.scheduling_ddpm", extra="train")
    scheduler = module.DDPMScheduler(
        num_train_timesteps=objective.num_timesteps,
        # The variance range follows the respaced betas: DDPMScheduler takes them from its own grid.
        variance_type="learned_range" if objective.learned_sigma else "fixed_small",
        clip_sample=clip_range is not None,
        clip_sample_range=1.0 if clip_range is None else clip_range,
    )
    # Its own is a float32 cumulative product: the betas it takes from it are off by up to 5e-4.
    scheduler.alphas_cumprod = objective.alphas_cumprod
    scheduler.set_timesteps(timesteps=timesteps)
    for step in steps:
        t = timesteps[step]
        prediction = predict(x, t, step)
        x = scheduler.step(prediction, t, x, generator=noise.generators, return_dict=False)[0]
    return x


def _ddim(
    predict: _Predict,
    x: Tensor,
    objective: DDPM,
    timesteps: list[int],
    steps: Iterable[int],
    clip_range: float | None,
    noise: StepNoise | None,
    eta: float,
) -> Tensor:
    # DDIMScheduler steps from t to t - num_timesteps // num_steps whatever its grid. That is right
    # on its "leading" grid alone, which starts well below the last timestep (897 of 999 for 300
    # steps) though x is pure noise. Here DDIM (arXiv 2010.02502, eq. 12) walks the grid of _ddpm.
    alphas_cumprod = objective.alphas_cumprod.tolist()
    channels = x.shape[1]
    for step in steps:
        t = timesteps[step]
        alpha_bar = alphas_cumprod[t]
        previous = alphas_cumprod[timesteps[step + 1]] if step + 1 < len(timesteps) else 1.0
        predicted_noise = predict(x, t, step)[:, :channels]
        data = (x - math.sqrt(1 - alpha_bar) * predicted_noise) / math.sqrt(alpha_bar)
        if clip_range is not None:
            data = data.clamp(-clip_range, clip_range)
            predicted_noise = (x - math.sqrt(alpha_bar) * data) / math.sqrt(1 - alpha_bar)
        variance = eta**2 * (1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)
        direction = math.sqrt(max(0.0, 1 - previous - variance))  # rounding only: it is never < 0
        x = math.sqrt(previous) * data + direction * predicted_noise
        if noise is not None and variance > 0:
            x = x + math.sqrt(variance) * noise.draw(x.device)
    return x


def _check_arguments(
    noise: Tensor,
    objective: RectifiedFlow | DDPM,
    sampler: str,
    num_steps: int,
    seeds: Sequence[int] | None,
    eta: float,
    clip_range: float | None,
) -> None:
    if sampler not in FLOW_SAMPLERS + DIFFUSION_SAMPLERS:
        raise ValueError(
            f"sampler must be one of {FLOW_SAMPLERS + DIFFUSION_SAMPLERS}, got {sampler!r}"
        )
    fitting = FLOW_SAMPLERS if isinstance(objective, RectifiedFlow) else DIFFUSION_SAMPLERS
    if sampler not in fitting:
        raise ValueError(
            f"sampler {sampler!r} does not sample a {type(objective).__name__} model; "
            f"use one of {fitting}"
        )
    if noise.dim() != 4 or noise.dtype != torch.float32:
        raise ValueError(
            f"noise must be (B, C, H, W) float32, got {tuple(noise.shape)} {noise.dtype}"
        )
    least = 2 if sampler == "ddpm" else 1  # a single DDPM step would end with noise added
    if num_steps < least:
        raise ValueError(f"{sampler} needs num_steps >= {least}, got {num_steps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    if eta > 0 and sampler != "ddim":
        raise ValueError(f"eta={eta} is an option of ddim; leave it at 0 for {sampler}")
    if clip_range is not None and clip_range <= 0:
        raise ValueError(f"clip_range must be > 0 or None, got {clip_range}")
    if seeds is None and (sampler == "ddpm" or eta > 0):
        raise ValueError(
            f"sampler {sampler!r} with eta={eta} draws noise at every step: give seeds, "
            f"one for each of the {noise.shape[0]} images"
        )
    if seeds is not None and len(seeds) != noise.shape[0]:
        raise ValueError(f"got {len(seeds)} seeds for {noise.shape[0]} images; give one an image")


@torch.no_grad()
def generate(
    model_fn: Callable[..., HasSample],
    noise: Tensor,
    *,
    objective: RectifiedFlow | DDPM,
    sampler: str,
    num_steps: int,
    cond: Mapping[str, Tensor] | None = None,
    uncond: Mapping[str, Tensor] | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    seeds: Sequence[int] | None = None,
    eta: float = 0.0,
    clip_range: float | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample images from a model. Each depends only on its own noise, seed and condition.

    Flow samplers take ``num_steps`` uniform steps from t = 1 to 0: "euler", or "heun" with
    2·num_steps - 1 model calls. Diffusion samplers walk ``num_steps`` timesteps spread evenly over
    the schedule: "ddpm" (ancestral, with the learned variance where the model has one, else the
    posterior variance beta_tilde) or "ddim". The update is computed in float32 whatever the model
    returns.

    Args:
        model_fn: called as ``model_fn(x (B, C, H, W), timesteps (B,) float32, **cond)``; the
            timesteps are t in [0, 1] for rectified flow and 0 .. num_timesteps - 1 for DDPM.
        noise: (B, C, H, W) float32, from ``noise_from_seeds``.
        objective: what the model was trained with.
        sampler: "euler" or "heun" for ``RectifiedFlow``, "ddpm" or "ddim" for ``DDPM``.
        num_steps: steps, at least 1 (ddpm: 2), for DDPM at most its num_timesteps.
        cond, uncond, guidance_scale, guidance_interval, guidance_channels: see ``guided``.
        seeds: B seeds for the noise of ddpm, and of ddim with eta > 0; those of ``noise`` may be
            given again, the streams do not overlap.
        eta: stochasticity of ddim, 0 (none) to 1 (as much as ddpm with beta_tilde).
        clip_range: clamp the predicted x_0 to [-clip_range, clip_range] at each step, for models
            of pixels; None for latents.
        callback: called once a step as ``callback(step, timestep, x, output)`` with the x given to
            the model and what it returned there (2B images where guidance was active, the
            conditional ones first).
        progress: show a progress bar.

    Returns:
        (B, C, H, W) float32.

    Raises:
        ValueError: an argument out of range, or a sampler that does not fit the objective.
        ImportError: diffusers (euler, ddpm) or tqdm (progress) is not installed.
    """
    _check_arguments(noise, objective, sampler, num_steps, seeds, eta, clip_range)
    denoise = guided(
        model_fn,
        cond,
        uncond,
        guidance_scale,
        guidance_interval,
        guidance_channels,
        max_timestep=objective.max_timestep,
    )

    def predict(x: Tensor, timestep: float, step: int | None = None) -> Tensor:
        denoised = denoise(x, timestep)
        if callback is not None and step is not None:
            callback(step, timestep, x, denoised.model_output)
        return objective.prediction(denoised.sample, x.shape[1])

    steps: Iterable[int] = range(num_steps)
    if progress:
        steps = require("tqdm.auto", extra="train").tqdm(steps, desc=sampler)
    if isinstance(objective, RectifiedFlow):
        flow_step = _euler if sampler == "euler" else _heun
        return flow_step(predict, noise, objective.sampling_timesteps(num_steps), steps, clip_range)

    timesteps = objective.sampling_timesteps(num_steps)
    _, channels, height, width = noise.shape
    step_noise = None if seeds is None else StepNoise(seeds, (channels, height, width))
    if sampler == "ddpm":
        assert step_noise is not None
        return _ddpm(predict, noise, objective, timesteps, steps, clip_range, step_noise)
    return _ddim(predict, noise, objective, timesteps, steps, clip_range, step_noise, eta)
