"""The mixture-of-experts FFN slot that all sparse models share; they differ in the routing."""

from typing import Any

from torch import Tensor

import moe_kernels as mk
from dit_models.model_config import ModelConfig
from dit_models.routing import LayerRouting, Router, RouterContext


class RoutedFFN(mk.MoE):
    """A ``MoE`` layer whose router reads more than the tokens, or returns more than a plan.

    ``out = expert_mlp(x, router(x, context).plan) + shared_expert(x)``; parameters as ``mk.MoE``.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, context: RouterContext | None = None
    ) -> tuple[Tensor, LayerRouting | mk.RoutingPlan]:
        """Process (B, S, D) tokens.

        Args:
            x: (B, S, D) normalised and modulated tokens.
            context: what the router may read beside them; ``None`` (``mk.warmup``) stands for a
                timestep embedding of zeros.

        Returns:
            (B, S, D), and the ``LayerRouting``; without a context the plan alone, as ``mk.MoE``.
        """
        router = self.router
        assert isinstance(router, Router)
        routing = router(x, _neutral(x) if context is None else context)
        tokens = x.flatten(0, 1)
        out = self.experts(tokens, routing.plan, self.shared_term(tokens)).view_as(x)
        return out, routing.plan if context is None else routing


def _neutral(x: Tensor) -> RouterContext:
    zeros = x.new_zeros(x.shape[0], x.shape[2])
    return RouterContext(x, zeros, zeros, (1.0,) * x.shape[0])


def moe_ffn(config: ModelConfig, block_index: int, **factory: Any) -> mk.MoE:
    """Experts and router of block ``block_index`` (from 0); ``factory`` is device and dtype."""
    moe_layer = config.moe_blocks.index(block_index)
    options = config.own_routing_options
    router = config.routing_idea.router(config, options, moe_layer, factory)
    layer = RoutedFFN if isinstance(router, Router) else mk.MoE
    return layer(
        config.hidden_size,
        config.expert_intermediate_size,
        config.num_experts,
        router=router,
        activation=config.expert_activation,
        bias=config.expert_bias,
        shared_intermediate_size=config.shared_intermediate_size,
        **factory,
    )
