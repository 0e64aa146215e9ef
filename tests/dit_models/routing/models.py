"""Tiny models of each routing, shared by the routing tests."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import moe_kernels as mk
from dit_models.backbone import DiT
from dit_models.model_config import ModelConfig
from dit_models.models import build_model
from dit_models.outputs import DiTOutput
from dit_models.presets import PRESETS
from dit_models.routing import RouterContext

# preset, and what of it is changed
ROUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "stages": (
        "EC-DiT-tiny",
        {"routing_options": {"capacity_by_stage": [[0.0, 2.0], [0.5, 1.0]]}},
    ),
    "noise": (
        "EC-DiT-tiny",
        {"routing_options": {"capacity_by_noise": [[0.2, 0.5], [0.8, 1.5]]}},
    ),
    "decoupled": ("EC-DiT-tiny-decoupled", {}),
    "diffmoe": ("EC-DiT-tiny-diffmoe", {}),
    "expert_race": ("EC-DiT-tiny-race", {}),
    "loss_free": ("DiT-MoE-tiny-loss-free", {}),
}


def tiny(name: str, **changes: Any) -> ModelConfig:
    """A configuration of two blocks, of a name of ``ROUTED`` or of a preset."""
    preset, own = ROUTED.get(name, (name, {}))
    size = {"depth": 2, "hidden_size": 32, "num_heads": 2, "num_experts": 4}
    return dataclasses.replace(PRESETS[preset], **(size | own | changes))


def moved(config: ModelConfig, seed: int = 0) -> DiT:
    """A model with every parameter off its start, where most gradients are 0."""
    torch.manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs_for(config: ModelConfig, batch_size: int = 3, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    side = config.image_size
    return {
        "latents": torch.randn(batch_size, config.in_channels, side, side, generator=generator),
        "timesteps": torch.rand(batch_size, generator=generator),
        "labels": torch.arange(batch_size) % (config.num_classes + 1),
    }


def total_loss(output: DiTOutput) -> Tensor:
    """Random upstream gradients for everything that a routed model returns."""
    generator = torch.Generator().manual_seed(2)

    def weighted(value: Tensor) -> Tensor:
        return (value * torch.randn(value.shape, generator=generator)).sum()

    loss = weighted(output.sample)
    for prediction in output.layer_predictions:
        loss = loss + weighted(prediction)
    for value in output.router_losses.values():
        loss = loss + 0.7 * value
    for plan in output.plans:
        loss = loss + 0.1 * mk.load_balance_loss(plan) + 0.1 * mk.router_z_loss(plan)
    return loss


def gradients(model: DiT, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sample, and the gradient of each parameter by name."""
    model.zero_grad()
    output = model(**inputs)
    total_loss(output).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.sample.detach(), found


def router_of(model: nn.Module) -> Any:
    """The router of the last block."""
    return model.blocks[-1].ffn.router  # type: ignore[index, union-attr]


def context_of(
    x: Tensor, timestep: Tensor | None = None, noise: list[float] | None = None
) -> RouterContext:
    """Tokens that are their own unmodulated ones."""
    timestep = x.new_zeros(x.shape[0], x.shape[2]) if timestep is None else timestep
    return RouterContext(x, timestep, timestep, None if noise is None else tuple(noise))
