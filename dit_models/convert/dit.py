"""Weights of DiT (facebookresearch/DiT): dense blocks with ``blocks.N.mlp.fc1`` and ``fc2``."""

from typing import Any

from dit_models.convert.layout import Choices, Format, Layout, Piece, Tensors, require_names
from dit_models.convert.published import (
    PLAIN_BACKBONE,
    attention_naming,
    check_writable,
    describe_backbone,
    published_layout,
)
from dit_models.model_config import ModelConfig

_TITLE = "a DiT checkpoint"


def _recognises(tensors: Tensors) -> bool:
    return any(name.startswith("blocks.") and ".mlp.fc1." in name for name in tensors)


def _describe(
    tensors: Tensors, diffusers_config: dict[str, Any], choices: Choices
) -> tuple[ModelConfig, dict[str, Any]]:
    del diffusers_config
    require_names(tensors, ["blocks.0.mlp.fc1.weight"], _TITLE)
    if choices.top_k is not None:
        raise ValueError(f"--top-k {choices.top_k}: {_TITLE} has no experts; leave it out.")
    fields = describe_backbone(tensors, choices, _TITLE)
    config = ModelConfig(
        family="dit",
        **fields,
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / fields["hidden_size"],
        mlp_bias="blocks.0.mlp.fc1.bias" in tensors,
    )
    return config, {"attention": attention_naming(tensors)}


def _ffn_pieces(name: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    theirs = name.replace(".ffn.up_proj.", ".mlp.fc1.").replace(".ffn.down_proj.", ".mlp.fc2.")
    return (Piece(theirs, shape),)


def _layout(config: ModelConfig, variant: dict[str, Any]) -> Layout:
    return published_layout(config, variant["attention"], _ffn_pieces)


def _default_variant(config: ModelConfig) -> dict[str, Any]:
    fixed = {"family": "dit", "mlp_activation": "gelu_tanh"}
    check_writable(config, _TITLE, PLAIN_BACKBONE | fixed)
    return {"attention": "timm"}


DIT = Format("dit", _TITLE, _recognises, _describe, _layout, _default_variant)
