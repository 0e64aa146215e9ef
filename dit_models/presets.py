"""The named models as data: the papers' sizes, their dense twins, and tiny ones for small data."""

from dataclasses import replace

from dit_models.model_config import ModelConfig

# depth, hidden_size, num_heads of DiT, which DiT-MoE and class-conditional EC-DiT share
_DIT_SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "G": (40, 1408, 16),
}
# hidden_size, num_heads, num_kv_heads, dense depth, MoE depth, experts (arXiv 2410.02098)
_EC_TEXT_SIZES = {
    "XL": (1152, 18, 6, 28, 28, 32),
    "XXL": (1536, 24, 6, 38, 38, 32),
    "3XL": (2304, 36, 6, 42, 42, 32),
    "M": (3072, 48, 12, 46, 38, 64),
}
# Width of a CLIP-type text encoder of about 0.67 B parameters; the paper does not print it.
_EC_TEXT_DIM = 1280
# Rectified flow has t in [0, 1], where sinusoids made for steps 0..999 hardly differ.
_FLOW_TIME_SCALE = 1000.0


def _class_conditional(size: str, patch_size: int = 2) -> ModelConfig:
    """Dense DiT for ImageNet 256 latents, rectified flow."""
    depth, hidden_size, num_heads = _DIT_SIZES[size]
    return ModelConfig(
        family="dit",
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        patch_size=patch_size,
        in_channels=4,
        out_channels=4,
        image_size=32,
        num_classes=1000,
        time_scale=_FLOW_TIME_SCALE,
    )


def _dit_moe(size: str, num_experts: int) -> ModelConfig:
    """As released: learned variance, timesteps unscaled, QK-norm in the two largest."""
    return replace(
        _class_conditional(size),
        family="dit_moe",
        out_channels=8,
        time_scale=1.0,
        qk_norm=size in ("XL", "G"),
        num_experts=num_experts,
        top_k=2,
        expert_activation="swiglu",
        shared_ratio=2.0,
    )


def _ec_class_conditional(size: str) -> ModelConfig:
    """Expert choice at the compute of the dense model (f_c = 1), the size others benchmark."""
    return replace(
        _class_conditional(size),
        family="ec_dit",
        num_experts=8,
        capacity_factor=1.0,
        moe_every=2,
        expert_bias=True,
    )


def _ec_text_dense(size: str) -> ModelConfig:
    hidden_size, num_heads, num_kv_heads, depth, _, _ = _EC_TEXT_SIZES[size]
    return ModelConfig(
        family="dit",
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        image_size=32,
        text_dim=_EC_TEXT_DIM,
        mlp_bias=False,
        time_scale=_FLOW_TIME_SCALE,
    )


def _ec_text(size: str) -> ModelConfig:
    *_, depth, num_experts = _EC_TEXT_SIZES[size]
    return replace(
        _ec_text_dense(size),
        family="ec_dit",
        depth=depth,
        num_experts=num_experts,
        capacity_factor=2.0,
        moe_every=2,
    )


# 16 x 16 grey images of 10 classes: 64 tokens
_DIT_TINY = ModelConfig(
    family="dit",
    depth=6,
    hidden_size=128,
    num_heads=4,
    patch_size=2,
    in_channels=1,
    out_channels=1,
    image_size=16,
    num_classes=10,
    qk_norm=True,  # stands a learning rate of 8e-3, which runs of minutes need
    time_scale=_FLOW_TIME_SCALE,
)
_EC_TINY = replace(
    _DIT_TINY, family="ec_dit", num_experts=8, capacity_factor=2.0, moe_every=2, expert_bias=True
)
_MOE_TINY = replace(
    _DIT_TINY,
    family="dit_moe",
    num_experts=8,
    top_k=2,
    expert_activation="swiglu",
    shared_ratio=2.0,
)
# Nucleus-Image's router: capacity rounded up, weights of a token that sum to 2.5, a shared expert
_DECOUPLED_TINY = replace(
    _EC_TINY,
    routing="decoupled",
    rounding="ceil",
    normalize="per_token",
    routing_scale=2.5,
    shared_ratio=2.0,
)
_DIFFMOE_TINY = replace(_EC_TINY, routing="diffmoe")
_RACE_TINY = replace(_EC_TINY, routing="expert_race", affinity="identity")
# The bias is added to sigmoid affinities, as in the paper: softmax ones shrink with E.
_LOSS_FREE_TINY = replace(_MOE_TINY, routing="loss_free", affinity="sigmoid", normalize="per_token")
# 32 x 32 colour images with captions: 64 tokens
_EC_TINY_TEXT = replace(
    _EC_TINY,
    hidden_size=160,
    num_heads=4,
    num_kv_heads=2,
    patch_size=4,
    in_channels=3,
    out_channels=3,
    image_size=32,
    num_classes=0,
    text_dim=128,
    mlp_bias=False,
    expert_bias=False,
)

PRESETS: dict[str, ModelConfig] = {
    **{f"DiT-{s}/{p}": _class_conditional(s, p) for s in ("S", "B", "L", "XL") for p in (2, 4, 8)},
    "DiT-MoE-S/2-8E2A": _dit_moe("S", 8),
    "DiT-MoE-S/2-16E2A": _dit_moe("S", 16),
    "DiT-MoE-B/2-8E2A": _dit_moe("B", 8),
    "DiT-MoE-L/2-8E2A": _dit_moe("L", 8),
    "DiT-MoE-XL/2-8E2A": _dit_moe("XL", 8),
    "DiT-MoE-G/2-16E2A": _dit_moe("G", 16),
    **{f"EC-DiT-{size}/2-8E": _ec_class_conditional(size) for size in ("S", "B", "L")},
    **{f"EC-DiT-{size}-dense": _ec_text_dense(size) for size in _EC_TEXT_SIZES},
    **{f"EC-DiT-{size}-{row[-1]}E": _ec_text(size) for size, row in _EC_TEXT_SIZES.items()},
    "DiT-tiny": _DIT_TINY,
    "DiT-MoE-tiny": _MOE_TINY,
    "EC-DiT-tiny": _EC_TINY,
    "EC-DiT-tiny-text": _EC_TINY_TEXT,
    "EC-DiT-tiny-decoupled": _DECOUPLED_TINY,
    "EC-DiT-tiny-diffmoe": _DIFFMOE_TINY,
    "EC-DiT-tiny-race": _RACE_TINY,
    "DiT-MoE-tiny-loss-free": _LOSS_FREE_TINY,
}
