"""Small checkpoints with the published names, shared by the tests of the converter."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_models.convert import Choices
from dit_models.model_config import ModelConfig
from dit_models.models import get_config
from moe_kernels.testing import assert_as_accurate

from ...models.published_dit_moe import build

HEADS = Choices(num_heads=4)


def small(preset: str, **fields: Any) -> ModelConfig:
    """A preset at a size for tests: 16 tokens, 5 classes."""
    sizes: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 4, "image_size": 8}
    if get_config(preset).num_experts:
        sizes["num_experts"] = 4
    return replace(get_config(preset), **(sizes | {"num_classes": 5} | fields))


S_LIKE = small("DiT-MoE-S/2-8E2A")
XL_LIKE = small("DiT-MoE-XL/2-8E2A")
DENSE = small("DiT-S/2", out_channels=8, time_scale=1.0)


def state_of(
    config: ModelConfig, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Tensor]:
    """The state dict of a random published model."""
    return {name: value.to(dtype) for name, value in build(config, **options).state_dict().items()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Assert equal names, dtypes, shapes and bits."""
    assert set(first) == set(second)
    for name, value in first.items():
        other = second[name]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        flat, other_flat = value.contiguous().flatten(), other.contiguous().flatten()
        assert torch.equal(flat.view(torch.uint8), other_flat.view(torch.uint8)), name


def inputs(config: ModelConfig, max_timestep: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and labels of three images, the null class among them."""
    side = config.image_size
    latents = torch.randn(3, config.in_channels, side, side)
    return latents, torch.rand(3) * max_timestep, torch.tensor([0, 3, config.num_classes])


def assert_same_function(ours: Any, published: torch.nn.Module, config: ModelConfig) -> None:
    """Compare a backbone of ours with its source, which is made fp64, by the house's rule."""
    for max_timestep in (1.0, 999.0):
        latents, timesteps, labels = inputs(config, max_timestep)
        with torch.no_grad():
            actual = ours(latents, timesteps, labels).sample
            plain = published.float()(latents, timesteps, labels)
            exact = published.double()(latents.double(), timesteps, labels)
        assert_as_accurate(actual, plain, exact)


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "conversion.json").read_text())
