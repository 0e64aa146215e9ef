"""From a ``TrainConfig`` to its model, objective, device and precision."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from dit_models.conditioned import ConditionedModel
from dit_models.config import ObjectiveConfig, TrainConfig
from dit_models.data import DatasetInfo
from dit_models.diffusion import DDPM, RectifiedFlow
from dit_models.model_config import ModelConfig
from dit_models.models import build_model, get_config
from dit_models.text import ByteTextEncoder

# What the data and the objective decide; a recipe's model preset gives the rest.
_FROM_DATA = ("in_channels", "out_channels", "image_size", "num_classes")


def model_config_for(config: TrainConfig, info: DatasetInfo) -> ModelConfig:
    """The model preset with its options, fitted to channels, size and conditions of the data.

    Raises:
        ValueError: an unknown option, one that the data decide, or data without what the model is
            conditioned on.
    """
    preset = get_config(config.model)
    options: dict[str, Any] = dict(config.model_options)
    for name in _FROM_DATA:
        if name in options:
            raise ValueError(f"model_options.{name} follows from the data; leave it out.")
    if preset.text_dim and not info.has_captions:
        raise ValueError(
            f"model {config.model} reads captions, and {info.name} has none; choose a "
            "class-conditional model (python -m dit_models.models)."
        )
    if not preset.text_dim and not info.num_classes:
        raise ValueError(
            f"model {config.model} is class-conditional, and {info.name} has captions instead of "
            "classes; choose a text model such as EC-DiT-tiny-text."
        )
    learned = config.objective.kind == "ddpm" and config.objective.learned_sigma
    fitted = preset.to_dict() | {
        "in_channels": info.channels,
        "out_channels": info.channels * (2 if learned else 1),
        "image_size": info.image_size,
        "num_classes": 0 if preset.text_dim else info.num_classes,
    }
    if config.objective.kind == "ddpm":
        fitted["time_scale"] = 1.0  # its timesteps already run from 0 to 999
    return ModelConfig.from_dict(fitted | options)


def build_conditioned_model(
    config: TrainConfig, info: DatasetInfo, device: torch.device | str
) -> ConditionedModel:
    """A fresh model for this data, initialised from the global random state."""
    model_config = model_config_for(config, info)
    text_encoder = None
    if model_config.text_dim:
        text_encoder = ByteTextEncoder(
            model_config.text_dim, config.text_max_length, config.text_depth
        )
    return ConditionedModel(build_model(model_config), text_encoder).to(device)


def build_objective(config: ObjectiveConfig) -> RectifiedFlow | DDPM:
    """The training objective."""
    if config.kind == "flow":
        return RectifiedFlow(config.logit_mean, config.logit_std, config.timesteps)
    return DDPM(config.num_timesteps, learned_sigma=config.learned_sigma)


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU when there is one.

    Raises:
        ValueError: an unknown device, or CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r}; expected auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}, and torch sees no CUDA GPU; use device=auto.")
    return device


def autocast_for(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast where it was asked for, or on its own on GPUs that have bf16."""
    if precision == "auto":
        precision = "bf16" if _has_bf16(device) else "fp32"
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _has_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bf16 itself; older ones only emulate it, slowly."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def with_defaults(config: TrainConfig) -> TrainConfig:
    """The config with every ``auto`` that does not depend on the machine resolved."""
    sampler = config.sampling.sampler
    if sampler == "auto":
        sampler = "heun" if config.objective.kind == "flow" else "ddim"
    return replace(config, sampling=replace(config.sampling, sampler=sampler))
