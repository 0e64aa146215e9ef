"""Weights of diffusers' ``DiTTransformer2DModel``: separate q, k, v, embedders in every block.

diffusers computes two things otherwise than DiT's own code. Its timestep frequencies have 127 in
the place of 128: ``time_frequency_shift=1`` here, which gives diffusers' numbers; for weights that
were trained with DiT's code (facebook/DiT-XL-2-256 is) 0 gives the frequencies of their training.
And ``norm_eps`` of the second norm of a block is 1e-5 by default, in DiT and here 1e-6.
"""

from typing import Any

from dit_models.convert.layout import (
    Choices,
    Format,
    Layout,
    Piece,
    Tensors,
    number_of,
    our_shapes,
    require_names,
)
from dit_models.convert.published import check_writable
from dit_models.model_config import ModelConfig

_TITLE = "a DiTTransformer2DModel of diffusers"
_ACTIVATIONS = {"gelu-approximate": "gelu_tanh", "gelu": "gelu"}
_BLOCK_NAMES = {
    "attn.proj": "attn1.to_out.0",
    "ffn.up_proj": "ff.net.0.proj",
    "ffn.down_proj": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_OTHER_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
# In every block the same.
_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}


def _recognises(tensors: Tensors) -> bool:
    return "pos_embed.proj.weight" in tensors and any(
        name.startswith("transformer_blocks.") and ".norm1.emb." in name for name in tensors
    )


def _describe(
    tensors: Tensors, diffusers_config: dict[str, Any], choices: Choices
) -> tuple[ModelConfig, dict[str, Any]]:
    what = _TITLE
    if not diffusers_config:
        raise ValueError(f"{what} needs its config.json; give the folder, not the file in it.")
    for name in ("num_attention_heads", "attention_head_dim", "sample_size"):
        if not isinstance(diffusers_config.get(name), int):
            raise ValueError(f"config.json of {what} lacks {name}.")
    if choices.top_k is not None:
        raise ValueError(f"--top-k {choices.top_k}: {what} has no experts; leave it out.")
    heads = diffusers_config["num_attention_heads"]
    if choices.num_heads not in (None, heads):
        raise ValueError(f"--num-heads {choices.num_heads}: config.json of {what} says {heads}.")
    activation = diffusers_config.get("activation_fn", "gelu-approximate")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation_fn={activation!r} of {what}: expected {' or '.join(_ACTIVATIONS)}."
        )
    first = "transformer_blocks.0."
    table = f"{first}norm1.emb.class_embedder.embedding_table.weight"
    require_names(tensors, [table, f"{first}ff.net.0.proj.weight", "proj_out_2.weight"], what)
    size, in_channels, patch_size = tensors["pos_embed.proj.weight"].shape[:3]
    shift = choices.time_frequency_shift
    config = ModelConfig(
        family="dit",
        depth=number_of(tensors, "transformer_blocks."),
        hidden_size=size,
        num_heads=heads,
        patch_size=patch_size,
        in_channels=in_channels,
        out_channels=tensors["proj_out_2.weight"].shape[0] // patch_size**2,
        image_size=diffusers_config["sample_size"],
        num_classes=tensors[table].shape[0] - 1,
        mlp_ratio=tensors[f"{first}ff.net.0.proj.weight"].shape[0] / size,
        mlp_bias=f"{first}ff.net.0.proj.bias" in tensors,
        mlp_activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
        qkv_bias=f"{first}attn1.to_q.bias" in tensors,
        time_frequency_shift=1 if shift is None else shift,
    )
    return config, {"diffusers_config": diffusers_config}


def _layout(config: ModelConfig, variant: dict[str, Any]) -> Layout:
    del variant
    pieces: dict[str, tuple[Piece, ...]] = {}
    copies = {}
    for name, shape in our_shapes(config).items():
        module, _, kind = name.rpartition(".")
        if module in _EMBEDDERS:
            original, *others = (
                f"transformer_blocks.{block}.norm1.emb.{_EMBEDDERS[module]}.{kind}"
                for block in range(config.depth)
            )
            pieces[name] = (Piece(original, shape),)
            copies.update(dict.fromkeys(others, original))
        elif name == "x_embedder.proj.weight":
            patch = (config.patch_size, config.patch_size)
            weight = (config.hidden_size, config.in_channels, *patch)
            pieces[name] = (Piece("pos_embed.proj.weight", weight),)
        elif module in _OTHER_NAMES:
            pieces[name] = (Piece(f"{_OTHER_NAMES[module]}.{kind}", shape),)
        else:
            _, block, part = module.split(".", 2)
            pieces[name] = _block_pieces(f"transformer_blocks.{block}", part, kind, shape)
    return Layout(pieces, copies)


def _block_pieces(block: str, part: str, kind: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    if part == "attn.qkv":
        third = (shape[0] // 3, *shape[1:])
        return tuple(Piece(f"{block}.attn1.to_{which}.{kind}", third) for which in "qkv")
    return (Piece(f"{block}.{_BLOCK_NAMES[part]}.{kind}", shape),)


def _default_variant(config: ModelConfig) -> dict[str, Any]:
    fixed = {
        "family": "dit",
        "text_dim": 0,
        "num_kv_heads": None,
        "positions": "sincos",
        "mask_decoder_depth": 0,
        "qk_norm": False,
        "mlp_ratio": 4.0,
        "mlp_bias": True,
        "time_scale": 1.0,
        "time_frequency_shift": 1,
    }
    check_writable(config, _TITLE, fixed)
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if config.mlp_activation not in names or not config.num_classes:
        raise ValueError(
            f"this model cannot be written as {_TITLE}: mlp_activation={config.mlp_activation!r}, "
            f"num_classes={config.num_classes}; it has {', '.join(names)} and classes."
        )
    return {
        "diffusers_config": {
            "_class_name": "DiTTransformer2DModel",
            "activation_fn": names[config.mlp_activation],
            "attention_bias": config.qkv_bias,
            "attention_head_dim": config.hidden_size // config.num_heads,
            "in_channels": config.in_channels,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "norm_type": "ada_norm_zero",
            "num_attention_heads": config.num_heads,
            "num_embeds_ada_norm": config.num_classes,
            "num_layers": config.depth,
            "out_channels": config.out_channels,
            "patch_size": config.patch_size,
            "sample_size": config.image_size,
        }
    }


DIFFUSERS_DIT = Format("diffusers", _TITLE, _recognises, _describe, _layout, _default_variant)
