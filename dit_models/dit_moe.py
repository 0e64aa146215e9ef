"""DiT-MoE (arXiv 2407.11633): token choice with a shared expert in the FFN slot."""

from collections.abc import Callable
from typing import Any

from torch import nn

from dit_models.backbone import DiT
from dit_models.dit import dense_ffn
from dit_models.model_config import ModelConfig
from dit_models.moe_ffn import moe_ffn


def dit_moe_ffn(config: ModelConfig, block_index: int, **factory: Any) -> nn.Module:
    """FFN of block ``block_index`` (from 0): each token takes its ``top_k`` best experts.

    In the published models every block is MoE: bias-free SwiGLU experts of width 4 D, one shared
    SwiGLU expert of width 2 D, softmax over the experts, top 2, weights not renormalised.
    ``config.routing`` may name another way in which tokens choose.
    """
    if block_index not in config.moe_blocks:
        return dense_ffn(config, **factory)
    return moe_ffn(config, block_index, **factory)


def build_dit_moe(
    config: ModelConfig, on_block: Callable[[nn.Module], None] | None = None, **factory: Any
) -> DiT:
    """A DiT-MoE; ``factory`` is device and dtype."""
    return DiT(
        config, lambda index: dit_moe_ffn(config, index, **factory), on_block=on_block, **factory
    )
