"""Models with random weights, so that every layer does its work: fresh ones predict 0."""

import math

import torch

from dit_models.backbone import DiT
from dit_models.model_config import ModelConfig
from dit_models.models import build_model


def random_model(config: ModelConfig, seed: int = 0) -> DiT:
    """A model in evaluation mode with normal weights of variance 1 / fan-in."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 100
            parameter.copy_(noise / math.sqrt(fan_in))
    return model.eval().requires_grad_(False)
