"""One MoE layer of the bundled models, which have the papers' sizes; shapes come from the presets.

Expert choice has biases here in every entry. The text-to-image sizes of EC-DiT have none, which is
a share of about 1/D of the weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from benchmarks.entry import Entry, Shape
from dit_models.model_config import ModelConfig
from dit_models.presets import PRESETS

MODES = ("forward", "both")

# Experts of a size whose truth in fp64, and gradients, fit in about 6 GB beside them.
_ON_CPU = (
    *("DiT-MoE-S/2-8E2A", "DiT-MoE-S/2-16E2A", "DiT-MoE-B/2-8E2A", "DiT-MoE-XL/2-8E2A"),
    *("EC-DiT-S/2-8E", "EC-DiT-B/2-8E", "EC-DiT-L/2-8E"),
)
_BFLOAT16_ON_CPU = ("DiT-MoE-B/2-8E2A", "EC-DiT-B/2-8E")
_ON_GPU = (
    *("DiT-MoE-S/2-8E2A", "DiT-MoE-B/2-8E2A", "DiT-MoE-L/2-8E2A", "DiT-MoE-G/2-16E2A"),
    *("EC-DiT-L/2-8E", "EC-DiT-XL-32E", "EC-DiT-XXL-32E", "EC-DiT-3XL-32E", "EC-DiT-M-64E"),
)


def layer_shape(config: ModelConfig, images: int) -> tuple[str, Shape]:
    """Stage and shape of one MoE layer on full images of the model.

    Raises:
        ValueError: for a model without experts, or with a ratio that the stages do not have.
    """
    width, rest = divmod(config.expert_intermediate_size, config.hidden_size)
    shared, shared_rest = divmod(config.shared_intermediate_size, config.hidden_size)
    if not config.num_experts or rest or shared_rest:
        raise ValueError(
            f"num_experts is {config.num_experts}, expert_ratio {config.expert_ratio}, "
            f"shared_ratio {config.shared_ratio}; expected experts with whole ratios."
        )
    shape = {
        "B": images,
        "S": config.seq_len,
        "D": config.hidden_size,
        "E": config.num_experts,
        "width": width,
    }
    if config.top_k:
        return "dit_moe_layer", {**shape, "K": config.top_k, "shared": shared}
    return "ec_layer", {**shape, "capacity_factor": config.capacity_factor}


def _entry(
    preset: str, prefix: str, images: int, plain: Mapping[str, tuple[str, ...]], dtype: str
) -> Entry:
    stage, shape = layer_shape(PRESETS[preset], images)
    tiny = {**shape, "B": 2, "S": 24, "D": 16, "E": 8}
    providers = (*plain[stage], "dense_limit", "ours")
    return Entry(f"{prefix}/{preset}", stage, shape, tiny, MODES, providers, dtype=dtype)


def _on_cpu() -> Iterator[Entry]:
    """One image."""
    plain = {
        "dit_moe_layer": ("published", "good_eager", "grouped_mm"),
        "ec_layer": ("one_hot", "good_eager"),
    }
    for preset in _ON_CPU:
        entry = _entry(preset, "model_layer", 1, plain, "float32")
        yield entry
        if preset in _BFLOAT16_ON_CPU:
            yield replace(entry, name=f"{entry.name}-bf16", dtype="bfloat16")


def _on_gpu() -> Iterator[Entry]:
    """32 images; the largest last, as it may not fit."""
    plain = {
        "dit_moe_layer": ("good_eager", "grouped_permute", "grouped_compiled"),
        "ec_layer": ("one_hot", "good_eager", "compiled"),
    }
    for preset in _ON_GPU:
        entry = _entry(preset, "gpu_model_layer", 32, plain, "bfloat16")
        yield replace(entry, memory=("good_eager", "dense_limit", "ours"))


PRESET_ENTRIES: tuple[Entry, ...] = tuple(_on_cpu())
GPU_PRESET_ENTRIES: tuple[Entry, ...] = tuple(_on_gpu())
