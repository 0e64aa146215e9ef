"""Weights of DiT-MoE as released: S and B with timm's attention names, XL and G with flash names.

``blocks.N.moe.gate.weight``, ``blocks.N.moe.experts.M.{gate,up,down}_proj.weight`` and
``blocks.N.moe.shared_experts.{gate,up,down}_proj.weight``.
"""

from typing import Any

from dit_models.convert.layout import (
    Choices,
    Format,
    Layout,
    Piece,
    Tensors,
    number_of,
    require_names,
)
from dit_models.convert.published import (
    PLAIN_BACKBONE,
    attention_naming,
    check_writable,
    describe_backbone,
    published_layout,
)
from dit_models.model_config import ModelConfig

_PUBLISHED_TOP_K = 2
_TITLE = "a DiT-MoE checkpoint"


def _recognises(tensors: Tensors) -> bool:
    return any(name.startswith("blocks.") and ".moe.gate." in name for name in tensors)


def _describe(
    tensors: Tensors, diffusers_config: dict[str, Any], choices: Choices
) -> tuple[ModelConfig, dict[str, Any]]:
    del diffusers_config
    expert, shared = "blocks.0.moe.experts.0.gate_proj.weight", "blocks.0.moe.shared_experts"
    require_names(tensors, [expert], _TITLE)
    fields = describe_backbone(tensors, choices, _TITLE)
    size = fields["hidden_size"]
    shared_gate = tensors.get(f"{shared}.gate_proj.weight")
    config = ModelConfig(
        family="dit_moe",
        **fields,
        num_experts=number_of(tensors, "blocks.0.moe.experts."),
        top_k=choices.top_k or _PUBLISHED_TOP_K,
        mlp_ratio=tensors[expert].shape[0] / size,
        expert_activation="swiglu",
        shared_ratio=shared_gate.shape[0] / size if shared_gate else 0.0,
    )
    return config, {"attention": attention_naming(tensors)}


def _ffn_pieces(name: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    block, _, part = name.partition(".ffn.")
    moe = f"{block}.moe"
    if part == "router.weight":
        return (Piece(f"{moe}.gate.weight", shape),)
    if part == "shared_expert.down_proj.weight":
        return (Piece(f"{moe}.shared_experts.down_proj.weight", shape),)
    if part == "shared_expert.gate_up_proj.weight":
        half = (shape[0] // 2, shape[1])
        names = (f"{moe}.shared_experts.{which}_proj.weight" for which in ("gate", "up"))
        return tuple(Piece(piece, half) for piece in names)
    experts = range(shape[0])
    if part == "experts.down_proj":
        return tuple(Piece(f"{moe}.experts.{e}.down_proj.weight", shape[1:]) for e in experts)
    assert part == "experts.gate_up_proj", name
    half = (shape[1] // 2, shape[2])
    return tuple(
        Piece(f"{moe}.experts.{e}.{which}_proj.weight", half)
        for e in experts
        for which in ("gate", "up")
    )


def _layout(config: ModelConfig, variant: dict[str, Any]) -> Layout:
    return published_layout(config, variant["attention"], _ffn_pieces)


def _default_variant(config: ModelConfig) -> dict[str, Any]:
    fixed = {"family": "dit_moe", "expert_activation": "swiglu", "expert_bias": False}
    routing = {"routing": None, "affinity": "softmax", "normalize": "none", "routing_scale": 1.0}
    check_writable(config, _TITLE, PLAIN_BACKBONE | fixed | routing | {"moe_every": 1})
    return {"attention": "flash" if config.qk_norm else "timm"}


DIT_MOE = Format("dit-moe", _TITLE, _recognises, _describe, _layout, _default_variant)
