"""DiT: the dense family, and the dense blocks of the others."""

from typing import Any

from torch import Tensor

import moe_kernels as mk
from dit_models.backbone import DiT
from dit_models.model_config import ModelConfig


class DenseFFN(mk.SharedExpert):
    """down_proj(gelu_tanh(up_proj(x))), (B, S, D) -> (B, S, D); it has no routing plan.

    Args:
        hidden_size: D.
        intermediate_size: F.
        bias: biases in both layers.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias: bool = True, **factory: Any
    ) -> None:
        super().__init__(hidden_size, intermediate_size, "gelu_tanh", bias, **factory)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """x (B, S, D) -> (out (B, S, D), None)."""
        return super().forward(x), None


def dense_ffn(config: ModelConfig, **factory: Any) -> DenseFFN:
    """The dense FFN that ``config`` describes; ``factory`` is device and dtype."""
    return DenseFFN(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, **factory)


def build_dit(config: ModelConfig, **factory: Any) -> DiT:
    """A dense diffusion transformer; ``factory`` is device and dtype."""
    return DiT(config, lambda block_index: dense_ffn(config, **factory), **factory)
