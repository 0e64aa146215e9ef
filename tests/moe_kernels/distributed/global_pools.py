"""Logits for pools over ranks, and what one process makes of all of them."""

import torch
from torch import Tensor, distributed

import moe_kernels as mk

KINDS = ("normal", "quantised", "equal", "wide", "zeros", "infinite", "nan", "all_nan")


def draw_logits(kind: str, tokens: int, experts: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(tokens, experts), the same in every process; ``kind`` says how they tie."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator, dtype=dtype)
    other = torch.rand(tokens, experts, generator=generator)
    if kind == "quantised":
        return (logits * 2).round() / 2
    if kind == "equal":
        return torch.full_like(logits, -1.5)
    if kind == "wide":
        return logits * torch.logspace(-30, 2, tokens, dtype=dtype).unsqueeze(1)
    if kind == "zeros":
        return torch.where(other < 0.5, 0.0, -0.0).to(dtype)
    if kind == "infinite":
        logits = torch.where(other < 0.3, float("inf"), logits)
        return torch.where(other > 0.7, float("-inf"), logits)
    if kind == "nan":
        return torch.where(other < 0.4, float("nan"), logits)
    if kind == "all_nan":
        return torch.full_like(logits, float("nan"))
    return logits


def share_of(sizes: list[int]) -> slice:
    """Rows of this rank, where rank r has ``sizes[r]`` of them."""
    rank = distributed.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def rows_of(plan: mk.RoutingPlan, where: slice) -> list[tuple[int, int, float]]:
    """(expert, token in the slice, weight) of the plan's rows, in their order."""
    triples = zip(
        plan.expert_of_row.tolist(),
        plan.token_indices.tolist(),
        plan.routing_weights.tolist(),
        strict=True,
    )
    return [(e, t - where.start, w) for e, t, w in triples if where.start <= t < where.stop]


def bits(rows: list[tuple[int, int, float]]) -> list[tuple[int, int, str]]:
    """The same with weights that compare exactly, NaN too; the sign of a zero is left open."""
    return [(e, t, (w + 0.0).hex()) for e, t, w in rows]
