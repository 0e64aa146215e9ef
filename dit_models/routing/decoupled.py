"""Decoupled router: logits from the timestep and the unmodulated tokens (Nucleus-Image)."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_kernels as mk
from dit_models.routing.base import LayerRouting, RouterContext
from dit_models.routing.expert_choice import ExpertChoiceKind, ScheduledRouter

if TYPE_CHECKING:
    from dit_models.model_config import ModelConfig


class DecoupledRouter(ScheduledRouter):
    """Expert choice whose logits are a linear map of [timestep embedding, norm(x)].

    The adaLN shift and scale of the timestep do not reach the router: it reads the timestep once,
    in plain sight. ``weight`` is (E, 2D), the timestep half first.
    """

    def __init__(self, config: "ModelConfig", options: Any, moe_layer: int, **factory: Any) -> None:
        in_features = 2 * config.hidden_size
        super().__init__(config, options, moe_layer, in_features=in_features, **factory)

    def forward(self, x: Tensor, context: RouterContext) -> LayerRouting:
        """Route (B, S, D) tokens by what they were before modulation."""
        tokens, timestep = context.unmodulated, context.timestep_embedding
        wide = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            by_timestep, by_token = self.weight.to(wide).split(self.hidden_size, dim=1)
            # The same as one product with the concatenation, which would repeat the timestep.
            logits = F.linear(tokens.to(wide), by_token)
            logits = logits + F.linear(timestep.to(wide), by_timestep).unsqueeze(1)
        return LayerRouting(self.choose(logits.flatten(0, 1), x, context))


class Decoupled(ExpertChoiceKind):
    """Expert choice per image with a decoupled router.

    Nucleus-Image: capacity rounded up (``rounding="ceil"``), weights divided by their sum over the
    experts that chose the token (``normalize="per_token"``), times 2.5 (``routing_scale``), a
    shared expert (``shared_ratio``), 64 experts, softmax or sigmoid affinity.
    """

    name = "decoupled"
    summary = "expert choice by timestep and unmodulated token (Nucleus-Image, arXiv 2604.12163)"

    def router(
        self, config: "ModelConfig", options: Any, moe_layer: int, factory: dict[str, Any]
    ) -> mk.LinearRouter:
        """A ``DecoupledRouter``."""
        return DecoupledRouter(config, options, moe_layer, **factory)

    def router_macs(self, config: "ModelConfig", seq_len: int) -> int:
        """The tokens, and the timestep once an image."""
        return (seq_len + 1) * config.hidden_size * config.num_experts
