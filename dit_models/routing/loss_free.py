"""Token choice balanced without a loss: a bias on the selection that follows the load."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import moe_kernels as mk
from dit_models.routing.base import (
    LayerRouting,
    Router,
    RouterContext,
    fail_option,
    is_number,
)
from dit_models.routing.token_choice import TokenChoice, token_choice_options

if TYPE_CHECKING:
    from dit_models.model_config import ModelConfig


@dataclass(frozen=True)
class LossFreeOptions:
    """How the bias follows the load."""

    bias_update_rate: float = field(
        default=1e-3,
        metadata={
            "help": (
                "u: bias += u · sign(mean load - load) after each step (arXiv 2408.15664: 0.001)"
            )
        },
    )

    def __post_init__(self) -> None:
        rate = self.bias_update_rate
        if not is_number(rate) or rate <= 0:
            fail_option("bias_update_rate", rate, "expected a number above 0")


class LossFreeRouter(Router):
    """Token choice by ``A + selection_bias``; the weights stay those of A.

    After each optimizer step ``bias_e += u · sign(mean_e' load_e' - load_e)``, with the load of the
    whole batch. The bias is a buffer in fp32: it gets no gradient and is saved with the weights.
    """

    selection_bias: Tensor

    def __init__(self, config: "ModelConfig", options: LossFreeOptions, **factory: Any) -> None:
        super().__init__(config.hidden_size, config.num_experts, **factory)
        self.routing = token_choice_options(config)
        self.bias_update_rate = options.bias_update_rate
        bias = torch.zeros(config.num_experts, device=factory.get("device"), dtype=torch.float32)
        self.register_buffer("selection_bias", bias)

    def forward(self, x: Tensor, context: RouterContext) -> LayerRouting:
        """Route (B, S, D) tokens."""
        plan = mk.token_choice(
            self.logits(x),
            selection_bias=self.selection_bias,
            num_groups=max(x.shape[0], 1),
            **self.routing,
        )
        if not self.training:
            return LayerRouting(plan)
        return LayerRouting(plan, observed={"load": plan.tokens_per_expert.float()})

    def update(self, observed: Mapping[str, Tensor]) -> None:
        """Raise the bias of experts below the mean load, lower that of those above."""
        load = observed["load"].double()
        missing = load.mean() - load
        # A mean over micro-batches or ranks is rounded: what is left of 0 must stay 0.
        missing = torch.where(missing.abs() > 1e-6 * load.mean(), missing, 0.0)
        step = self.bias_update_rate * torch.sign(missing)
        self.selection_bias.add_(step.to(self.selection_bias.dtype))

    def reset_parameters(self) -> None:
        """Fresh weights, no bias."""
        super().reset_parameters()
        if "selection_bias" in self._buffers:
            self.selection_bias.zero_()


class LossFree(TokenChoice):
    """Loss-free balancing (DeepSeek): no gradient interferes with the training."""

    name = "loss_free"
    summary = "token choice balanced by a selection bias (arXiv 2408.15664)"
    options = LossFreeOptions

    def router(
        self, config: "ModelConfig", options: Any, moe_layer: int, factory: dict[str, Any]
    ) -> mk.LinearRouter:
        """A ``LossFreeRouter``."""
        return LossFreeRouter(config, options, **factory)
