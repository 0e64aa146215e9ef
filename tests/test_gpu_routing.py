"""Routing kernels on a GPU: selection exact, numbers and gradients as accurate as PyTorch."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.backends.reference.affinity import ranking_key
from moe_kernels.testing import assert_as_accurate, make_logits, relative_error

from .gpu_cases import DEVICES, ROUTED_BY

# G, S, E, C: short and long pools, one that no power of two divides, one over a whole batch.
POOLS = {
    "cuda": (
        (32, 256, 8, 64),
        (32, 1024, 64, 32),
        (3, 1000, 5, 400),
        (4, 4096, 32, 256),
        (2, 16384, 16, 2048),
        (1, 262144, 8, 65536),
        (5, 1, 3, 1),
    ),
    "cpu": ((2, 20, 3, 7), (1, 9, 4, 9)),
}
# T, E, K.
TOKENS = {"cuda": ((8192, 8, 2), (32768, 64, 2), (4099, 60, 6), (1, 5, 5)), "cpu": ((10, 4, 2),)}
KINDS = ("normal", "ties", "equal", "collapsed", "extreme")


@pytest.fixture(autouse=True, params=ROUTED_BY)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with mk.use_backend(request.param):
        yield


def best_first(values: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest of the last dimension, equal ones by rising index."""
    return ranking_key(values).sort(dim=-1, descending=True, stable=True).indices[..., :count]


def logits_for(device: str, kind: str, tokens: int, experts: int) -> Tensor:
    return make_logits(tokens, experts, kind).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_expert_choice_takes_the_best_of_its_own_affinities(device, kind):
    for groups, size, experts, capacity in POOLS[device]:
        logits = logits_for(device, kind, groups * size, experts)
        plan = mk.expert_choice(logits, capacity=capacity, num_groups=groups).validate()
        probs = plan.router_probs.cpu()
        by_expert = probs.view(groups, size, experts).permute(2, 0, 1)  # (E, G, S)
        chosen = best_first(by_expert, capacity).sort(-1).values
        expected = (chosen + torch.arange(groups).view(-1, 1) * size).flatten()
        assert torch.equal(plan.token_indices.cpu().long(), expected), (groups, size, experts)
        assert torch.equal(plan.routing_weights.cpu(), by_expert.gather(-1, chosen).flatten())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_token_choice_takes_the_best_of_its_own_affinities(device, kind):
    for tokens, experts, top_k in TOKENS[device]:
        plan = mk.token_choice(logits_for(device, kind, tokens, experts), top_k).validate()
        probs = plan.router_probs.cpu()
        best = best_first(probs, top_k)
        assert plan.expert_indices is not None
        assert torch.equal(plan.expert_indices.cpu().long(), best), (tokens, experts)
        order = best.flatten().argsort(stable=True)
        assert torch.equal(plan.token_indices.cpu().long(), order // top_k)
        expected = probs.gather(1, best).flatten()[order]
        assert torch.equal(plan.routing_weights.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_infinite_logits_rank_last_and_first(device):
    tokens, experts = (4096, 16) if device == "cuda" else (12, 4)
    logits = logits_for(device, "normal", tokens, experts)
    logits[1::7, 0], logits[2::7, 1], logits[3::7] = float("nan"), float("inf"), float("-inf")
    plan = mk.expert_choice(
        logits, affinity="sigmoid", num_groups=2, capacity=tokens // 4, check_finite=False
    )
    by_expert = plan.router_probs.cpu().view(2, -1, experts).permute(2, 0, 1)
    chosen = best_first(by_expert, tokens // 4).sort(-1).values
    expected = (chosen + torch.arange(2).view(-1, 1) * (tokens // 2)).flatten()
    assert torch.equal(plan.token_indices.cpu().long(), expected)


ROUTERS = {
    "expert choice": lambda logits: mk.expert_choice(logits, 2.0, num_groups=2),
    "expert choice per token": lambda logits: mk.expert_choice(
        logits, 2.0, num_groups=2, affinity="sigmoid", normalize="per_token"
    ),
    "token choice": lambda logits: mk.token_choice(logits, 2, num_groups=2),
    "token choice per token": lambda logits: mk.token_choice(
        logits, 2, normalize="per_token", scale=2.5
    ),
}


def formula(name: str, logits: Tensor, plan: mk.RoutingPlan, upstream: Tensor) -> Tensor:
    """Gradient of a mix of weights and losses by plain PyTorch, for the plan's selection."""
    logits = logits.detach().requires_grad_()
    probs = logits.sigmoid() if plan.affinity == "sigmoid" else logits.softmax(-1)
    tokens, experts = plan.token_indices.long(), plan.expert_of_row.long()
    weights = probs[tokens, experts]
    if name.endswith("per token"):
        sums = torch.zeros_like(probs[:, 0]).index_add(0, tokens, weights)
        weights = weights / sums[tokens]
        weights = weights * 2.5 if name.startswith("token") else weights
    loss = (weights * upstream.to(weights)).sum() + 0.3 * logits.logsumexp(-1).square().mean()
    if plan.affinity == "softmax":
        share = plan.tokens_per_expert * (plan.num_experts / plan.num_rows)
        loss = loss + 0.7 * (share * probs.mean(0)).sum()
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_are_as_accurate_as_plain_pytorch(device, name):
    sizes = ((4096, 8), (8192, 64), (1002, 5)) if device == "cuda" else ((12, 3),)
    for tokens, experts in sizes:
        logits = logits_for(device, "normal", tokens, experts).requires_grad_()
        plan = ROUTERS[name](logits)
        upstream = torch.randn_like(plan.routing_weights)
        loss = (plan.routing_weights * upstream).sum() + 0.3 * mk.router_z_loss(plan)
        if plan.affinity == "softmax":
            loss = loss + 0.7 * mk.load_balance_loss(plan)
        (actual,) = torch.autograd.grad(loss, logits)
        plain = formula(name, logits, plan, upstream)
        exact = formula(name, logits.double(), plan, upstream)
        assert_as_accurate(actual, plain, exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ROUTERS)
def test_two_runs_route_alike_to_the_bit(device, name):
    tokens = 65536 if device == "cuda" else 12
    logits = logits_for(device, "ties", tokens, 8).requires_grad_()
    runs = []
    for _ in range(2):
        plan = ROUTERS[name](logits)
        losses = (
            mk.load_balance_loss(plan),
            mk.router_z_loss(plan),
            mk.router_similarity_loss(plan),
        )
        (gradient,) = torch.autograd.grad(plan.routing_weights.square().sum() + sum(losses), logits)
        runs.append((plan.routing_weights, plan.token_indices, plan.row_indices, *losses, gradient))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_losses_equal_the_references(device):
    tokens, experts = (8192, 16) if device == "cuda" else (12, 4)
    logits = logits_for(device, "normal", tokens, experts)
    plan = mk.token_choice(logits, 2)
    exact = mk.token_choice(logits.double().cpu(), 2, backend="reference")
    for loss in (mk.load_balance_loss, mk.router_z_loss, mk.router_similarity_loss):
        expected = loss(exact, backend="reference")
        assert relative_error(loss(plan).cpu(), expected) < 4e-6, loss.__name__


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("route", ["expert_choice", "token_choice"])
def test_no_tokens_make_an_empty_plan(device, route):
    logits = torch.zeros(0, 4, device=device, requires_grad=True)
    plan = getattr(mk, route)(logits)
    assert plan.num_rows == 0
    assert plan.expert_offsets.tolist() == [0] * 5
    torch.autograd.grad(plan.routing_weights.sum(), logits)
