"""What the published DiT and DiT-MoE checkpoints have in common: all but the FFN of a block."""

import math
from collections.abc import Callable
from typing import Any

from dit_models.convert.layout import (
    Choices,
    Layout,
    Piece,
    Tensors,
    number_of,
    our_shapes,
    require_names,
)
from dit_models.model_config import ModelConfig
from dit_models.presets import PRESETS

# Two names for the same projections: those of timm, and those of a FlashAttention block. The rows
# of both fused projections are queries, keys, values, each head after head (of the flash variant
# as in HunyuanDiT's attention, whose names it has: inferred, not printed in the paper).
_ATTENTION_NAMES = {
    "timm": {"qkv": "qkv", "proj": "proj"},
    "flash": {"qkv": "Wqkv", "proj": "out_proj"},
}
FfnPieces = Callable[[str, tuple[int, ...]], tuple[Piece, ...]]


def attention_naming(tensors: Tensors) -> str:
    """ "timm" or "flash"."""
    return "flash" if "blocks.0.attn.Wqkv.weight" in tensors else "timm"


def describe_backbone(tensors: Tensors, choices: Choices, what: str) -> dict[str, Any]:
    """The fields of ``ModelConfig`` that the FFN does not decide."""
    naming = attention_naming(tensors)
    qkv = f"blocks.0.attn.{_ATTENTION_NAMES[naming]['qkv']}"
    needed = ["x_embedder.proj.weight", "pos_embed", "final_layer.linear.weight", f"{qkv}.weight"]
    require_names(tensors, [*needed, "y_embedder.embedding_table.weight"], what)
    hidden_size, in_channels, patch_size = tensors["x_embedder.proj.weight"].shape[:3]
    depth = number_of(tensors, "blocks.")
    side = math.isqrt(tensors["pos_embed"].shape[-2])
    qk_norm = "blocks.0.attn.q_norm.weight" in tensors
    if qk_norm:
        num_heads = hidden_size // tensors["blocks.0.attn.q_norm.weight"].shape[0]
        if choices.num_heads not in (None, num_heads):
            raise ValueError(
                f"--num-heads {choices.num_heads}: the query norm of {what} says {num_heads}."
            )
    else:
        num_heads = choices.num_heads or known_heads(depth, hidden_size, what)
    return {
        "depth": depth,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // patch_size**2,
        "image_size": side * patch_size,
        "num_classes": tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        "qkv_bias": f"{qkv}.bias" in tensors,
        "qk_norm": qk_norm,
    }


def known_heads(depth: int, hidden_size: int, what: str) -> int:
    """Heads of the published size with this depth and width.

    Raises:
        ValueError: no published model has this size.
    """
    heads = {
        preset.num_heads
        for preset in PRESETS.values()
        if (preset.depth, preset.hidden_size) == (depth, hidden_size)
    }
    if len(heads) != 1:
        raise ValueError(
            f"{what} has {depth} blocks of width {hidden_size}, no published size, and its weights "
            "do not say how many attention heads it has: give --num-heads."
        )
    return heads.pop()


def published_layout(config: ModelConfig, naming: str, ffn_pieces: FfnPieces) -> Layout:
    """The layout of a checkpoint with the published names.

    Args:
        config: of the model.
        naming: "timm" or "flash".
        ffn_pieces: name and shape of one of our FFN tensors -> its pieces.
    """
    pieces = {}
    for name, shape in our_shapes(config).items():
        if ".ffn." in name:
            pieces[name] = ffn_pieces(name, shape)
        elif name == "x_embedder.proj.weight":
            patch = (config.patch_size, config.patch_size)
            pieces[name] = (Piece(name, (config.hidden_size, config.in_channels, *patch)),)
        else:
            published = name
            for ours, theirs in _ATTENTION_NAMES[naming].items():
                published = published.replace(f".attn.{ours}.", f".attn.{theirs}.")
            pieces[name] = (Piece(published, shape),)
    positions = Piece("pos_embed", (1, config.seq_len, config.hidden_size))
    return Layout(pieces, positions=positions)


def check_writable(config: ModelConfig, format_title: str, expected: dict[str, Any]) -> None:
    """Raise ValueError unless the fields of a configuration are those that a format can hold."""
    wrong = [
        f"{name}={getattr(config, name)!r} (it has {value!r})"
        for name, value in expected.items()
        if getattr(config, name) != value
    ]
    if wrong:
        raise ValueError(f"this model cannot be written as {format_title}: {', '.join(wrong)}.")


# What a published DiT never has.
PLAIN_BACKBONE: dict[str, Any] = {
    "text_dim": 0,
    "num_kv_heads": None,
    "positions": "sincos",
    "qk_norm_kind": "layer_norm",
    "mask_decoder_depth": 0,
    "time_scale": 1.0,
    "time_frequency_shift": 0,
}
