"""The families of blocks of public diffusion models that cannot be installed, at tiny sizes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...models import tc_dit
from ...models.diffmoe import Mlp, SparseMoEBlock
from ...models.dit_moe import MoeMLP, SparseMoeBlock
from ...models.micro_diffusion import FeedForwardECMoe
from .parity import Family, Inputs, Ranking

HIDDEN, INNER, EXPERTS, TOP_K = 16, 24, 4, 2

EXPERT_KINDS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Mlp(HIDDEN, INNER),
    "mlp, exact gelu": lambda: Mlp(HIDDEN, INNER, nn.GELU),
    "mlp without bias": lambda: Mlp(HIDDEN, INNER, bias=False),
    "swiglu": lambda: MoeMLP(HIDDEN, INNER),
}


def make_experts(kind: str) -> list[nn.Module]:
    """Experts of one of the kinds that these repositories have."""
    return [EXPERT_KINDS[kind]() for _ in range(EXPERTS)]


def draw_tokens(generator: torch.Generator, batch_size: int, seq_len: int) -> Inputs:
    return (torch.randn(batch_size, seq_len, HIDDEN, generator=generator),)


def rank_for_tokens(block: Any, inputs: Inputs) -> list[Ranking]:
    """Token choice."""
    return [((inputs[0] @ block.gate.weight.T).softmax(-1), block.gate.top_k)]


def rank_for_experts(logits: Tensor, taken: int) -> list[Ranking]:
    """Expert choice, where an expert takes this many tokens of each image."""
    return [(logits.softmax(-1).transpose(1, 2), taken)] if taken else []


def dit_moe_family(name: str = "DiT-MoE", shared: int | None = 2, **gate_options: Any) -> Family:
    """DiT-MoE's block; by default without a balance loss that could be noticed, since contracts
    compare evaluation with training."""

    def build() -> nn.Module:
        options = {"alpha": 1e-30} | gate_options
        block = SparseMoeBlock(HIDDEN, 2, EXPERTS, options.get("top_k", TOP_K), shared)
        for key, value in options.items():
            setattr(block.gate, key, value)
        return block

    return Family(
        name,
        build,
        draw_tokens,
        rank_for_tokens,
        graph_breaks=3,
        differentiable_in_eval=False,
        works_under_autocast=False,
    )


def tc_dit_family(kind: str, shared: int = 1, name_of_k: str = "num_experts_per_tok") -> Family:
    def build() -> nn.Module:
        experts = make_experts(kind)
        block = tc_dit.SparseMoEBlock(experts, HIDDEN, EXPERTS, TOP_K, shared, name_of_k)
        block.gate.alpha = 1e-30
        return block

    return Family(
        f"TC-DiT, {kind}",
        build,
        draw_tokens,
        rank_for_tokens,
        differentiable_in_eval=False,
    )


def ec_dit_family(kind: str, capacity: float = 2, shared: int = 1) -> Family:
    def build() -> nn.Module:
        return SparseMoEBlock(make_experts(kind), HIDDEN, EXPERTS, shared, capacity)

    def rankings(block: Any, inputs: Inputs) -> list[Ranking]:
        taken = int((inputs[0].shape[1] / EXPERTS) * capacity)
        return rank_for_experts(inputs[0] @ block.gate_weight.T, taken)

    return Family(f"EC-DiT, {kind}", build, draw_tokens, rankings)


def micro_diffusion_family(capacity: float = 2, approximate: str = "none") -> Family:
    def build() -> nn.Module:
        block = FeedForwardECMoe(EXPERTS, capacity, HIDDEN, 22, 8)
        block.gelu = nn.GELU(approximate)
        return block

    def rankings(block: Any, inputs: Inputs) -> list[Ranking]:
        taken = int(capacity * inputs[0].shape[1] / EXPERTS)
        return rank_for_experts(block.gate(inputs[0]), taken)

    return Family("micro-diffusion", build, draw_tokens, rankings)
