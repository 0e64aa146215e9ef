"""DiT: the dense family, and the dense blocks of the others."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import moe_kernels as mk
from dit_models.backbone import DiT
from dit_models.model_config import ModelConfig


class DenseFFN(mk.SharedExpert):
    """down_proj(activation(up_proj(x))), (B, S, D) -> (B, S, D); it has no routing plan.

    With "swiglu" ``gate_up_proj`` takes the place of ``up_proj``, the gate half first:
    down_proj(SiLU(gate) * up).

    Args:
        hidden_size: D.
        intermediate_size: F.
        bias: biases in both layers.
        activation: "gelu_tanh", "gelu" or "swiglu".
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = True,
        activation: str = "gelu_tanh",
        **factory: Any,
    ) -> None:
        super().__init__(hidden_size, intermediate_size, activation, bias, **factory)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """x (B, S, D) -> (out (B, S, D), None)."""
        return super().forward(x), None


def dense_ffn(config: ModelConfig, **factory: Any) -> DenseFFN:
    """The dense FFN that ``config`` describes; ``factory`` is device and dtype."""
    return DenseFFN(
        config.hidden_size,
        config.intermediate_size,
        bias=config.mlp_bias,
        activation=config.mlp_activation,
        **factory,
    )


def build_dit(
    config: ModelConfig, on_block: Callable[[nn.Module], None] | None = None, **factory: Any
) -> DiT:
    """A dense diffusion transformer; ``factory`` is device and dtype."""
    return DiT(
        config, lambda block_index: dense_ffn(config, **factory), on_block=on_block, **factory
    )
