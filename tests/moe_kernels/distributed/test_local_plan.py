"""The plans by which a rank runs its experts over rows that arrived by rank."""

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.distributed.local_plan import ragged_plan, static_plan


def by_hand(counts: Tensor) -> tuple[list[int], list[int]]:
    """Which received row each row in expert order is, and the rows of each expert."""
    ranks, experts = counts.shape
    owners = [
        (expert, rank)
        for rank in range(ranks)
        for expert in range(experts)
        for _ in range(int(counts[rank, expert]))
    ]
    order = sorted(range(len(owners)), key=lambda row: owners[row])
    return order, counts.sum(0).tolist()


def check(plan: mk.RoutingPlan, counts: Tensor) -> None:
    order, rows = by_hand(counts)
    plan.validate()
    assert plan.token_indices.tolist() == order
    assert plan.tokens_per_expert.tolist() == rows
    assert plan.routing_weights.tolist() == [1.0] * len(order)
    assert plan.experts_per_token.tolist() == [1] * len(order)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 4), (4, 1, 5), (3, 2, 0), (2, 2, 1)])
def test_static(sizes: tuple[int, int, int]) -> None:
    ranks, experts, rows = sizes
    plan = static_plan(ranks, experts, rows, torch.device("cpu"))
    check(plan, torch.full((ranks, experts), rows))
    assert plan.rows_per_expert == ranks * rows


@pytest.mark.parametrize("seed", range(20))
def test_ragged(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ranks, experts = torch.randint(1, 5, (2,), generator=generator).tolist()
    counts = torch.randint(-4, 6, (ranks, experts), generator=generator).clamp_min(0).int()
    plan = ragged_plan(counts, int(counts.sum()))
    check(plan, counts)
    assert plan.rows_per_expert is None


def test_nothing_arrived() -> None:
    check(ragged_plan(torch.zeros(2, 3, dtype=torch.int32), 0), torch.zeros(2, 3))
