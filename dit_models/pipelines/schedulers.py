"""diffusers' schedulers and our objectives: which fit, and what a model reads as its timestep."""

from typing import Any

import numpy as np
from torch import Tensor

from dit_models.config import ObjectiveConfig, SamplingConfig
from dit_models.extras import require


def scheduler_for(objective: ObjectiveConfig, sampling: SamplingConfig) -> Any:
    """The scheduler of an objective: Euler for rectified flow, ancestral DDPM for noise prediction.

    DDPM stands on the grid that is spread over the whole schedule ("linspace"), as our sampler.
    """
    diffusers = require("diffusers", extra="train")
    if objective.kind == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler()
    clip = sampling.clip_range
    return diffusers.DDPMScheduler(
        num_train_timesteps=objective.num_timesteps,
        variance_type="learned_range" if objective.learned_sigma else "fixed_small",
        clip_sample=clip is not None,
        clip_sample_range=1.0 if clip is None else clip,
        timestep_spacing="linspace",
    )


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler steps along velocities of rectified flow."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return True
    return scheduler.config.get("prediction_type") == "flow_prediction"


def check_fits(scheduler: Any, objective: str) -> None:
    """Raise ValueError unless a scheduler is for "flow" or "ddpm", whichever is asked."""
    if is_flow(scheduler) != (objective == "flow"):
        expected = (
            'a FlowMatch scheduler, or one with prediction_type="flow_prediction"'
            if objective == "flow"
            else "a scheduler for noise prediction: DDIM, DDPM, DPM-Solver, ..."
        )
        raise ValueError(
            f"{type(scheduler).__name__} does not fit this model, which was trained with "
            f"{objective}; use {expected}."
        )
    if objective == "ddpm" and scheduler.config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(
            f"scheduler with prediction_type={scheduler.config['prediction_type']!r}; this model "
            'predicts noise: use "epsilon".'
        )


def set_timesteps(scheduler: Any, num_steps: int, device: Any) -> None:
    """Set a scheduler's grid; that of Euler is 1, 1 - 1/N, ..., 1/N, as our sampler's.

    Left alone, diffusers' flow schedulers spread their steps over 1 .. 1/1000 and jump to 0.
    """
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), device=device)
    else:
        scheduler.set_timesteps(num_steps, device=device)


def model_timestep(scheduler: Any, timestep: float) -> float:
    """What the model reads for a scheduler's timestep: t in [0, 1] for flow, else the same."""
    if is_flow(scheduler):
        return timestep / float(scheduler.config.num_train_timesteps)
    return timestep


def prediction_for(scheduler: Any, sample: Tensor, channels: int) -> Tensor:
    """The part of a prediction that a scheduler reads: without the variance but for DDPM."""
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    if learned and type(scheduler).__name__ == "DDPMScheduler":
        return sample
    return sample[:, :channels]
