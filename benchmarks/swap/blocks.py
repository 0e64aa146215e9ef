"""The blocks: real classes where a package has them, clean-room ones of tests/models elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, EXPERTS = 512, 8


@dataclass(frozen=True)
class Block:
    """A block of one family at width 512, made when asked for.

    Attributes:
        name: of the family.
        build: the module, in training mode, with random weights.
        inputs: its arguments for a number of tokens, as one image or sequence.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]


def _tokens(count: int) -> tuple[Tensor, ...]:
    return (torch.randn(1, count, WIDTH),)


def _hidream() -> nn.Module:
    from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

    return MOEFeedForwardSwiGLU(WIDTH, 4 * WIDTH, num_routed_experts=4, num_activated_experts=2)


def _nucleus(experts: int) -> nn.Module:
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoELayer

    # The proportions of Nucleus-Image: expert width 1344 for hidden size 2048; factor 2 as in most
    # of its layers.
    return _random_weights(NucleusMoELayer(WIDTH, 336, experts, 2.0, False, 2.5))


def _nucleus_inputs(count: int) -> tuple[Tensor, ...]:
    return *_tokens(count), *_tokens(count), torch.randn(1, WIDTH)


def _dit_moe() -> nn.Module:
    from tests.models.dit_moe import SparseMoeBlock

    return SparseMoeBlock(WIDTH, num_experts=EXPERTS, num_experts_per_tok=2)


def _ec_dit() -> nn.Module:
    from tests.models.diffmoe import Mlp, SparseMoEBlock

    experts = [Mlp(WIDTH, 4 * WIDTH) for _ in range(EXPERTS)]
    return SparseMoEBlock(experts, WIDTH, EXPERTS, capacity=2)


def _micro_diffusion() -> nn.Module:
    from tests.models.micro_diffusion import FeedForwardECMoe

    return _random_weights(FeedForwardECMoe(EXPERTS, 2.0, WIDTH, 4 * WIDTH, WIDTH))


def _mixtral() -> nn.Module:
    return _transformers("mixtral", "Mixtral", num_local_experts=EXPERTS, intermediate_size=1536)


def _gpt_oss() -> nn.Module:
    return _transformers("gpt_oss", "GptOss", num_local_experts=EXPERTS, intermediate_size=1536)


def _transformers(package: str, name: str, **sizes: int) -> nn.Module:
    from importlib import import_module

    home = import_module(f"transformers.models.{package}")
    config: Any = getattr(home, f"{name}Config")(hidden_size=WIDTH, **sizes)
    config._experts_implementation_internal = "grouped_mm"  # the default of a whole model
    modeling = import_module(f"transformers.models.{package}.modeling_{package}")
    return _random_weights(getattr(modeling, f"{name}Experts")(config))


def _routed(count: int) -> tuple[Tensor, ...]:
    weights, index = torch.rand(count, EXPERTS).topk(2)
    return torch.randn(count, WIDTH), index, weights / weights.sum(dim=-1, keepdim=True)


def _random_weights(module: nn.Module) -> nn.Module:
    """For classes that leave their weights uninitialised."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.03)
    return module


BLOCKS = (
    Block("HiDream-I1", _hidream, _tokens),
    Block("Nucleus-Image, 8 experts", lambda: _nucleus(8), _nucleus_inputs),
    Block("Nucleus-Image, 64 experts", lambda: _nucleus(64), _nucleus_inputs),
    Block("DiT-MoE", _dit_moe, _tokens),
    Block("EC-DiT (DiffMoE)", _ec_dit, _tokens),
    Block("micro-diffusion", _micro_diffusion, _tokens),
    Block("Mixtral experts", _mixtral, _routed),
    Block("GPT-OSS experts", _gpt_oss, _routed),
)
