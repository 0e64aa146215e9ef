"""EC-DiT (arXiv 2410.02098): expert choice in the FFN slot of every second block."""

from collections.abc import Callable
from typing import Any

from torch import nn

from dit_models.backbone import DiT
from dit_models.dit import dense_ffn
from dit_models.model_config import ModelConfig
from dit_models.moe_ffn import moe_ffn


def ec_dit_ffn(config: ModelConfig, block_index: int, **factory: Any) -> nn.Module:
    """FFN of block ``block_index`` (from 0): each expert takes its C = S f_c / E best tokens.

    The affinity is a softmax over the experts and the routing weight is its raw value. A token
    that no expert takes gets exactly 0 from the FFN. ``config.routing`` may name another way in
    which experts choose.
    """
    if block_index not in config.moe_blocks:
        return dense_ffn(config, **factory)
    return moe_ffn(config, block_index, **factory)


def build_ec_dit(
    config: ModelConfig, on_block: Callable[[nn.Module], None] | None = None, **factory: Any
) -> DiT:
    """An EC-DiT; ``factory`` is device and dtype."""
    return DiT(
        config, lambda index: ec_dit_ffn(config, index, **factory), on_block=on_block, **factory
    )
