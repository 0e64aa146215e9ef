"""Whole models of diffusers and transformers at tiny sizes, called with tensors only.

In 16 bits the original itself takes other experts than in fp64 where a choice hangs on the last
digits, so the arguments are such that it takes the same ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .families import EXPERTS, HIDDEN, TOP_K, rank_for_experts, rank_for_tokens
from .parity import Family, Inputs, Ranking

VOCABULARY = 32


class Whole(nn.Module):
    """A model that is called with tensors by position.

    Args:
        model: that is meant.
        call: from the model and these tensors to its output.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.model, *inputs)


def hidream_model(num_layers: int = 1, num_single_layers: int = 1) -> nn.Module:
    from diffusers import HiDreamImageTransformer2DModel

    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=HIDDEN,
        num_attention_heads=1,
        caption_channels=[8, 12],
        text_emb_dim=8,
        num_routed_experts=EXPERTS,
        num_activated_experts=TOP_K,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(8, 8),
        llama_layers=[0] * (num_layers + num_single_layers),
    )


def call_hidream(model: Any, image: Tensor, t5: Tensor, llama: Tensor, pooled: Tensor) -> Any:
    return model(
        image,
        timesteps=torch.tensor([300] * image.shape[0]),
        encoder_hidden_states_t5=t5,
        encoder_hidden_states_llama3=llama,
        pooled_embeds=pooled,
        return_dict=False,
    )


def draw_for_hidream(generator: torch.Generator, batch_size: int, seq_len: int) -> Inputs:
    shapes = (batch_size, 4, 4, 4), (batch_size, 1, 8), (1, batch_size, 1, 12), (batch_size, 8)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def nucleus_model(num_layers: int = 2) -> nn.Module:
    from diffusers.models.transformers.transformer_nucleusmoe_image import (
        NucleusMoEImageTransformer2DModel,
    )

    return NucleusMoEImageTransformer2DModel(
        patch_size=1,
        in_channels=6,
        num_layers=num_layers,
        attention_head_dim=HIDDEN,
        num_attention_heads=1,
        joint_attention_dim=10,
        axes_dims_rope=(4, 6, 6),
        dense_moe_strategy="all_moe",
        num_experts=EXPERTS,
        moe_intermediate_dim=24,
        capacity_factors=2.0,
    )


def call_nucleus(model: Any, image: Tensor, text: Tensor) -> Any:
    return model(
        image,
        img_shapes=(1, 2, 4),
        encoder_hidden_states=text,
        encoder_hidden_states_mask=torch.ones(text.shape[:2], dtype=torch.bool),
        timestep=torch.full((image.shape[0],), 0.3),
        return_dict=False,
    )


def draw_for_nucleus(generator: torch.Generator, batch_size: int, seq_len: int) -> Inputs:
    shapes = (batch_size, 8, 6), (batch_size, 3, 10)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


SIZES: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": EXPERTS},
    "Qwen3Moe": {
        "intermediate_size": 24,
        "moe_intermediate_size": 24,
        "num_experts": EXPERTS,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "DeepseekV3": {
        "intermediate_size": 24,
        "moe_intermediate_size": 24,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "GptOss": {"intermediate_size": 24, "num_local_experts": EXPERTS, "head_dim": 8},
}


def language_model(name: str, num_layers: int = 2, **options: Any) -> nn.Module:
    import transformers

    heads = 2 if name == "DeepseekV3" else 1
    config = getattr(transformers, f"{name}Config")(
        hidden_size=HIDDEN,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=heads,
        num_experts_per_tok=TOP_K,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        attn_implementation="eager",
        **SIZES[name],
        **options,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


def call_language_model(model: Any, embeddings: Tensor) -> Any:
    return model(inputs_embeds=embeddings, use_cache=False).logits


def draw_embeddings(generator: torch.Generator, batch_size: int, seq_len: int) -> Inputs:
    return (torch.randn(batch_size, seq_len, HIDDEN, generator=generator),)


def rank_for_router(router: Any, inputs: Inputs) -> list[Ranking]:
    """The choice of a router of transformers, which returns its logits first."""
    logits = router(*inputs)[0]
    sigmoid = hasattr(router, "e_score_correction_bias")
    return [(logits.sigmoid() if sigmoid else logits.softmax(-1), router.top_k)]


# By the class of what routes.
RANKINGS: dict[str, Callable[[Any, Inputs], list[Ranking]]] = {
    "MOEFeedForwardSwiGLU": rank_for_tokens,
    "NucleusMoELayer": rank_for_experts,
    "MixtralTopKRouter": rank_for_router,
    "Qwen3MoeTopKRouter": rank_for_router,
    "DeepseekV3TopkRouter": rank_for_router,
    "GptOssTopKRouter": rank_for_router,
}


def rankings_of_model(model: nn.Module, inputs: Inputs) -> list[Ranking]:
    """The choices of all layers."""
    with calls_of_routers(model) as calls:
        model(*inputs)
    assert calls
    return [
        ranking
        for router, given in calls
        for ranking in RANKINGS[type(router).__name__](router, given)
    ]


@contextmanager
def calls_of_routers(model: nn.Module) -> Iterator[list[tuple[Any, Inputs]]]:
    """What routes in a model, and what each was given."""
    calls: list[tuple[Any, Inputs]] = []

    def keep(module: nn.Module, args: Inputs, kwargs: dict[str, Tensor]) -> None:
        calls.append((module, (*args, *kwargs.values())))

    hooks = [
        module.register_forward_pre_hook(keep, with_kwargs=True)
        for module in model.modules()
        if type(module).__name__ in RANKINGS
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def whole(
    name: str, build: Callable[[], nn.Module], call: Any, draw: Any, **differences: Any
) -> Family:
    """The models as a family."""
    return Family(
        name,
        lambda: Whole(build(), call),
        draw,
        rankings_of_model,
        weight_scale=0.2,
        **differences,
    )


# Few layers in 16 bits: at the second choice, rounding has moved the original itself.
HIDREAM_MODELS = {
    dtype: whole(
        "HiDream",
        partial(hidream_model, *layers),
        call_hidream,
        draw_for_hidream,
        differentiable_in_eval=False,
    )
    for dtype, layers in ((torch.float32, (1, 1)), (torch.bfloat16, (1, 0)))
}
NUCLEUS_MODELS = {
    torch.float32: whole("Nucleus", nucleus_model, call_nucleus, draw_for_nucleus),
    torch.bfloat16: whole("Nucleus", partial(nucleus_model, 1), call_nucleus, draw_for_nucleus),
}
LANGUAGE_MODELS = {
    name: {
        dtype: whole(
            name, partial(language_model, name, layers), call_language_model, draw_embeddings
        )
        for dtype, layers in ((torch.float32, 2), (torch.bfloat16, 1))
    }
    for name in SIZES
}
