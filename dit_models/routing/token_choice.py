"""Token choice: each token takes its ``top_k`` best experts (DiT-MoE, arXiv 2407.11633)."""

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import moe_kernels as mk
from dit_models.routing.base import Routing, fail

if TYPE_CHECKING:
    from dit_models.model_config import ModelConfig


class TokenChoice(Routing):
    """Softmax (or sigmoid) over the experts, top k, no token is ever dropped."""

    name = "token_choice"
    family = "dit_moe"
    summary = "each token takes its top_k best experts (DiT-MoE, arXiv 2407.11633)"
    fields = ("top_k",)

    def check(self, config: "ModelConfig", options: Any) -> None:
        """``top_k`` fits the experts, and the affinity is one of the two that tokens have."""
        if not 1 <= config.top_k <= config.num_experts:
            fail("top_k", config.top_k, f"expected 1 to num_experts={config.num_experts}")
        if config.affinity == "identity":
            fail("affinity", config.affinity, "token choice has softmax or sigmoid")

    def router(
        self, config: "ModelConfig", options: Any, moe_layer: int, factory: dict[str, Any]
    ) -> mk.LinearRouter:
        """The plain router of ``moe_kernels``."""
        return mk.TokenChoiceRouter(
            config.hidden_size, config.num_experts, **token_choice_options(config), **factory
        )

    def experts_per_token(self, config: "ModelConfig", options: Any, moe_layer: int) -> Fraction:
        """K."""
        return Fraction(config.top_k)


def token_choice_options(config: "ModelConfig") -> dict[str, Any]:
    """Options of ``mk.TokenChoiceRouter``."""
    return {
        "top_k": config.top_k,
        "affinity": config.affinity,
        "normalize": config.normalize,
        "scale": config.routing_scale,
    }
