"""The mixture-of-experts FFN slot that both sparse families share; they differ in the router."""

from typing import Any

import moe_kernels as mk
from dit_models.model_config import ModelConfig


def moe_ffn(
    config: ModelConfig, router: mk.ExpertChoiceRouter | mk.TokenChoiceRouter, **factory: Any
) -> mk.MoE:
    """Experts of ``config`` behind ``router``; ``factory`` is device and dtype."""
    return mk.MoE(
        config.hidden_size,
        config.intermediate_size,
        config.num_experts,
        router=router,
        activation=config.expert_activation,
        bias=config.expert_bias,
        shared_intermediate_size=config.shared_intermediate_size,
        **factory,
    )
