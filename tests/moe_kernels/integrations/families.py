"""The families of blocks that are installed from the package index, at tiny sizes.

The packages are imported when a block is made.
"""

import importlib
import math
from functools import partial
from typing import Any

import torch
from torch import nn

from .parity import Family, Inputs, Ranking

HIDDEN, EXPERTS, TOP_K = 16, 4, 2


def hidream_block() -> nn.Module:
    from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

    return MOEFeedForwardSwiGLU(HIDDEN, 24, EXPERTS, TOP_K)


def rank_for_tokens(block: Any, inputs: Inputs) -> list[Ranking]:
    """HiDream's choice."""
    return [((inputs[0] @ block.gate.weight.T).softmax(-1), block.gate.top_k)]


def draw_tokens(generator: torch.Generator, batch_size: int, seq_len: int) -> Inputs:
    return (torch.randn(batch_size, seq_len, HIDDEN, generator=generator),)


HIDREAM = Family(
    "HiDream",
    hidream_block,
    draw_tokens,
    rank_for_tokens,
    graph_breaks=2,
    differentiable_in_eval=False,
)


def nucleus_block(use_sigmoid: bool = True) -> nn.Module:
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoELayer

    return NucleusMoELayer(
        HIDDEN,
        24,
        EXPERTS,
        capacity_factor=2.0,
        use_sigmoid=use_sigmoid,
        route_scale=2.5,
    )


def draw_tokens_and_timestep(generator: torch.Generator, batch_size: int, seq_len: int) -> Inputs:
    shapes = (batch_size, seq_len, HIDDEN), (batch_size, seq_len, HIDDEN), (batch_size, HIDDEN)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def rank_for_experts(block: Any, inputs: Inputs) -> list[Ranking]:
    """Nucleus' choice."""
    _, unmodulated, timestep = inputs
    seq_len = unmodulated.shape[1]
    wide = torch.cat([timestep.unsqueeze(1).expand(-1, seq_len, -1), unmodulated], -1)
    logits = block.gate(wide)
    affinity = logits.sigmoid() if block.use_sigmoid else logits.softmax(-1)
    capacity = max(1, math.ceil(block.capacity_factor * seq_len / block.num_experts))
    return [(affinity.transpose(1, 2), capacity)]


NUCLEUS = Family(
    "Nucleus",
    nucleus_block,
    draw_tokens_and_timestep,
    rank_for_experts,
    graph_breaks=2,
    works_under_autocast=False,
)


def transformers_experts(model: str, name: str, **sizes: Any) -> nn.Module:
    """The experts class of a model of transformers, made for itself."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    configurations = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    classes = vars(configurations)
    config_class = classes.get(f"{name}TextConfig") or classes[f"{name}Config"]
    config = config_class(hidden_size=HIDDEN, num_attention_heads=2, **sizes)
    config._experts_implementation = "eager"
    return getattr(module, f"{name}Experts")(config)


def draw_choices(generator: torch.Generator, batch_size: int, seq_len: int) -> Inputs:
    num_tokens = batch_size * seq_len
    tokens = torch.randn(num_tokens, HIDDEN, generator=generator)
    scores = torch.rand(num_tokens, EXPERTS, generator=generator)
    weights, index = scores.topk(TOP_K)
    return tokens, index, weights


def _transformers_family(model: str, name: str, **sizes: Any) -> Family:
    return Family(name, partial(transformers_experts, model, name, **sizes), draw_choices)


_SMALL = {"intermediate_size": 24, "num_local_experts": EXPERTS}
_SMALL_MOE = {"moe_intermediate_size": 24, "num_local_experts": EXPERTS}

MIXTRAL = _transformers_family("mixtral", "Mixtral", **_SMALL)
QWEN3_MOE = _transformers_family("qwen3_moe", "Qwen3Moe", **_SMALL_MOE)
DEEPSEEK_V3 = _transformers_family("deepseek_v3", "DeepseekV3", **_SMALL_MOE)
GPT_OSS = _transformers_family("gpt_oss", "GptOss", **_SMALL)
TRANSFORMERS = (MIXTRAL, QWEN3_MOE, DEEPSEEK_V3, GPT_OSS)

# One or two models each have these layouts: transposed; with a norm behind each expert; without a
# gate; transposed with biases and a gate of its own.
RARE = (
    _transformers_family("aria", "Aria", intermediate_size=24, moe_num_experts=EXPERTS),
    _transformers_family("muse_spark", "MuseSpark", moe_hidden_size=HIDDEN, **_SMALL_MOE),
    _transformers_family(
        "nemotron_h", "NemotronH", moe_intermediate_size=24, n_routed_experts=EXPERTS
    ),
    _transformers_family("openai_privacy_filter", "OpenAIPrivacyFilter", **_SMALL),
)
