"""DiT: the dense family, and the dense blocks of the others."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dit_models.backbone import DiT
from dit_models.initialization import reset_layers
from dit_models.model_config import ModelConfig


class DenseFFN(nn.Module):
    """down_proj(gelu_tanh(up_proj(x))), (B, S, D) -> (B, S, D); it has no routing plan.

    Args:
        hidden_size: D.
        intermediate_size: F.
        bias: biases in both layers.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias: bool = True, **factory: Any
    ) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias, **factory)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias, **factory)
        self.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x (B, S, D) -> (out (B, S, D), None)."""
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh")), None

    def reset_parameters(self) -> None:
        """Xavier uniform weights, zero biases."""
        reset_layers(self)


def dense_ffn(config: ModelConfig, **factory: Any) -> DenseFFN:
    """The dense FFN that ``config`` describes; ``factory`` is device and dtype."""
    return DenseFFN(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, **factory)


def build_dit(config: ModelConfig, **factory: Any) -> DiT:
    """A dense diffusion transformer; ``factory`` is device and dtype."""
    return DiT(config, lambda block_index: dense_ffn(config, **factory), **factory)
