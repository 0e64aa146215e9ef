"""From a ``TrainConfig`` to its model, objective, device and precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import moe_kernels as mk
from dit_models.conditioned import ConditionedModel
from dit_models.config import ObjectiveConfig, TextConfig, TrainConfig
from dit_models.data import DatasetInfo
from dit_models.diffusion import DDPM, RectifiedFlow
from dit_models.model_config import ModelConfig
from dit_models.models import build_model, get_config
from dit_models.text import (
    ByteTextEncoder,
    EmbeddingCache,
    EncoderSpec,
    FrozenEncoder,
    PretrainedText,
    describe_encoder,
)

# What the data and the objective decide; a recipe's model preset gives the rest.
_FROM_DATA = ("in_channels", "out_channels", "image_size", "num_classes")
_BYTE_LENGTH = 128


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
    if config.data.vae and info.vae is None:
        raise ValueError(
            f"data.vae={config.data.vae!r} has no effect on {info.name}, which holds images and no "
            "latents; leave it out, or make latents: python -m dit_models.precompute."
        )
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
    if not preset.text_dim and config.text != TextConfig():
        raise ValueError(
            f"model {config.model} is class-conditional, so {config.text} has no effect; leave "
            "text. out, or choose a text model."
        )
    if preset.text_dim and config.text.projection == "none":
        spec = text_spec_for(config, info)
        if spec is not None:
            if "text_dim" in options:
                raise ValueError(
                    "model_options.text_dim follows from the text encoder without a projection; "
                    "leave it out, or set text.projection=linear."
                )
            options["text_dim"] = spec.dim
    learned = config.objective.kind == "ddpm" and config.objective.learned_sigma
    fitted = preset.to_dict() | {
        "in_channels": info.channels,
        "out_channels": info.channels * (2 if learned else 1),
        "image_size": info.image_size,
        "num_classes": 0 if preset.text_dim else info.num_classes,
    }
    if config.objective.kind == "ddpm":
        fitted["time_scale"] = 1.0  # its timesteps already run from 0 to 999
    if "routing" in options:
        fitted["routing_options"] = {}  # those of the preset's routing
    own = options.get("routing_options", {})
    if isinstance(own, dict):  # else the model's configuration refuses it
        options["routing_options"] = fitted["routing_options"] | own
    model = ModelConfig.from_dict(fitted | options)
    if config.objective.kind == "ddpm" and model.reads_noise_levels:
        return replace(model, max_timestep=float(config.objective.num_timesteps))
    return model


def build_conditioned_model(
    config: TrainConfig,
    info: DatasetInfo,
    device: torch.device | str,
    on_block: Callable[[nn.Module], None] | None = None,
) -> ConditionedModel:
    """A fresh model for this data, initialised from the global random state.

    ``on_block`` is called with each block as soon as it is made.
    """
    model_config = model_config_for(config, info)
    text_encoder: ByteTextEncoder | PretrainedText | None = None
    if model_config.text_dim:
        text_encoder = build_text_encoder(config, info, model_config.text_dim)
    return ConditionedModel(build_model(model_config, on_block=on_block), text_encoder).to(device)


def text_spec_for(config: TrainConfig, info: DatasetInfo) -> EncoderSpec | None:
    """The pretrained text encoder of a run; ``None`` for the byte-level one.

    Raises:
        ValueError: a field of ``config.text`` that has no effect, or that contradicts the text
            features that the data already hold.
    """
    text = config.text
    stored = None if info.text is None else EncoderSpec(**info.text)
    if text.encoder == "bytes" or (text.encoder == "auto" and stored is None):
        names = ("revision", "layer", "dtype", "projection", "null", "cache")
        _refuse_changed(text, names, "the byte-level text encoder")
        return None
    _refuse_changed(text, ("depth",), "a pretrained text encoder")
    dtype = None if text.dtype == "auto" else text.dtype
    if stored is None:
        return describe_encoder(
            text.encoder,
            revision=text.revision,
            max_length=text.max_length,
            layer=text.layer,
            dtype=dtype or "fp32",
        )
    asked = {"max_length": text.max_length, "layer": text.layer, "dtype": dtype}
    for name, value in asked.items():
        if value is not None and value != getattr(stored, name):
            raise ValueError(
                f"text.{name}={value!r}, and {info.name} holds text encoded with "
                f"{getattr(stored, name)!r}; set it to that, or precompute the text again."
            )
    if text.encoder == "auto":
        return stored
    return replace(stored, encoder=text.encoder, revision=text.revision)


def _refuse_changed(text: TextConfig, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if getattr(text, name) != getattr(TextConfig(), name):
            raise ValueError(
                f"text.{name}={getattr(text, name)!r} has no effect on {what}; leave it out."
            )


def build_text_encoder(
    config: TrainConfig, info: DatasetInfo, text_dim: int
) -> ByteTextEncoder | PretrainedText:
    """The text encoder of a run, whose features are ``text_dim`` wide for the model.

    The weights of a pretrained one are read when the first caption has to be encoded.
    """
    text = config.text
    spec = text_spec_for(config, info)
    if spec is None:
        return ByteTextEncoder(text_dim, byte_length(config), text.depth)
    cache = None
    if text.cache != "none":
        folder = mk.cache_folder() / "text" if text.cache == "auto" else text.cache
        cache = EmbeddingCache(folder)
    projected = text_dim if text.projection == "linear" else None
    return PretrainedText(FrozenEncoder(spec, cache), projected, text.null)


def byte_length(config: TrainConfig) -> int:
    """Longest byte sequence of the byte-level encoder, end marks included."""
    length = config.text.max_length
    return _BYTE_LENGTH if length is None else length


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
    dtype = product_dtype(precision, device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def product_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What autocast takes products in; ``None`` where it changes nothing."""
    if precision == "auto":
        precision = "bf16" if _has_bf16(device) else "fp32"
    return None if precision == "fp32" else torch.bfloat16


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
