"""``validate`` finds every broken invariant; ``stats`` counts right."""

import dataclasses

import pytest
import torch

import moe_kernels as mk
from moe_kernels.testing import make_logits


def expert_plan() -> mk.RoutingPlan:
    return mk.expert_choice(make_logits(16, 4), num_groups=2)


def token_plan() -> mk.RoutingPlan:
    return mk.token_choice(make_logits(16, 4), 2)


def swapped(tensor: torch.Tensor, i: int, j: int) -> torch.Tensor:
    out = tensor.clone()
    out[[i, j]] = out[[j, i]]
    return out


BREAKAGES = {
    "token out of range": lambda p: {"token_indices": p.token_indices + 100},
    "int64 indices": lambda p: {"token_indices": p.token_indices.long()},
    "rows out of order": lambda p: {"token_indices": swapped(p.token_indices, 0, 1)},
    "inverse swapped": lambda p: {"row_indices": swapped(p.row_indices, 0, -1)},
    "inverse repeated": lambda p: {"row_indices": torch.zeros_like(p.row_indices)},
    "offsets do not start at 0": lambda p: {"expert_offsets": p.expert_offsets + 1},
    "counts disagree": lambda p: {"tokens_per_expert": p.tokens_per_expert + 1},
    "short weights": lambda p: {"routing_weights": p.routing_weights[:-1]},
    "half weights": lambda p: {"routing_weights": p.routing_weights.half()},
}


@pytest.mark.parametrize("make", [expert_plan, token_plan])
@pytest.mark.parametrize("name", BREAKAGES)
def test_validate_finds(make, name):
    plan = make()
    assert plan.validate() is plan
    with pytest.raises(ValueError, match="RoutingPlan is inconsistent"):
        dataclasses.replace(plan, **BREAKAGES[name](plan)).validate()


def test_validate_finds_a_token_of_another_group():
    plan = expert_plan()
    moved = plan.token_indices.view(4, 2, -1).flip(1).flatten()
    row_indices = torch.argsort(moved, stable=True).int()
    broken = dataclasses.replace(plan, token_indices=moved, row_indices=row_indices)
    with pytest.raises(ValueError, match="from every group"):
        broken.validate()


def test_validate_finds_expert_indices_that_name_other_experts():
    plan = token_plan()
    other = dataclasses.replace(plan, expert_indices=(plan.expert_indices + 1) % 4)
    with pytest.raises(ValueError, match="expert_indices"):
        other.validate()


def test_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        expert_plan().num_tokens = 3


def test_stats_of_a_known_plan():
    logits = torch.tensor([[4.0, 0.0], [3.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]])
    plan = mk.expert_choice(logits, capacity=1, affinity="softmax")
    stats = plan.stats
    assert plan.token_indices.tolist() == [0, 3]
    assert stats.tokens_per_expert.tolist() == [1, 1]
    assert stats.experts_per_token_histogram.tolist() == [2, 2, 0]
    assert float(stats.unrouted_fraction) == 0.5
    probs = torch.softmax(logits, -1)
    torch.testing.assert_close(stats.mean_prob, probs.mean(0))
    entropy = torch.distributions.Categorical(probs=probs).entropy().mean()
    torch.testing.assert_close(stats.entropy, entropy)


def test_stats_of_saturated_routing_are_finite():
    stats = mk.token_choice(make_logits(8, 4, "extreme"), 1).stats
    assert bool(torch.isfinite(stats.entropy))
    assert not stats.mean_prob.requires_grad
