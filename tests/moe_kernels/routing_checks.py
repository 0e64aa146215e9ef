"""What a routing kernel has to do, for the tests of the backends that have one.

Indices are compared with the reference's algorithm applied to the backend's own affinities, numbers
and gradients with the reference in fp64, by the error of plain PyTorch in fp32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.backends.reference.affinity import ranking_key
from moe_kernels.backends.reference.token_choice import keep_best_groups
from moe_kernels.testing import LOGIT_KINDS, assert_as_accurate, make_logits

from .routing_cases import PER_TOKEN, RESULTS, ROUTES

INF, NAN = float("inf"), float("nan")
AFFINITIES = ("softmax", "sigmoid", "identity")
KINDS = (*LOGIT_KINDS, "duplicates")


def logits_of(kind: str, tokens: int, experts: int, seed: int = 0) -> Tensor:
    if kind != "duplicates":
        return make_logits(tokens, experts, kind, seed)
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(3, experts, generator=generator)
    return few[torch.randint(3, (tokens,), generator=generator)]


def broken_logits(tokens: int, experts: int, seed: int) -> Tensor:
    """Normal logits with NaN and infinities strewn in, and a few rows of nothing else."""
    logits = make_logits(tokens, experts, "normal", seed)
    generator = torch.Generator().manual_seed(seed)
    for value in (NAN, INF, -INF):
        logits[torch.rand(tokens, experts, generator=generator) < 0.08] = value
        logits[torch.randint(tokens, (1,), generator=generator)] = value
    return logits


def best_first(key: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest of the last dimension, equal ones by rising index."""
    key = ranking_key(key) + 0.0  # no -0.0, which a GPU's radix sort may rank below 0.0
    return torch.sort(key, dim=-1, descending=True, stable=True).indices[..., :count]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def check_rows(plan: mk.RoutingPlan, chosen: Tensor) -> None:
    """Compare every index of a plan with the (T, E) 0/1 selection it has to describe."""
    plan.validate()
    parts, groups = plan.packed_indices, plan.num_groups
    by_group = chosen.view(groups, -1, plan.num_experts)
    assert torch.equal(parts.group_counts.long(), by_group.sum(1).flatten())
    assert torch.equal(plan.tokens_per_expert.long(), chosen.sum(0))
    row_of = torch.full(chosen.shape, -1, device=chosen.device)
    rows = torch.arange(plan.num_rows, device=chosen.device)
    row_of[plan.token_indices.long(), plan.expert_of_row.long()] = rows
    assert torch.equal(row_of >= 0, chosen)
    assert torch.equal(plan.row_indices.long(), row_of[chosen])
    assert torch.equal(parts.row_experts.long(), chosen.nonzero()[:, 1])
    held = torch.bincount(chosen.sum(1), minlength=plan.num_experts + 1)
    assert torch.equal(parts.histogram.long(), held)
    weights = plan.router_probs[plan.token_indices.long(), plan.expert_of_row.long()]
    assert_same(plan.routing_weights, weights)


def check_expert_choice(
    logits: Tensor, capacity: int, groups: int, affinity: str
) -> mk.RoutingPlan:
    plan = mk.expert_choice(
        logits, capacity=capacity, num_groups=groups, affinity=affinity, check_finite=False
    )
    tokens, experts = logits.shape
    key = plan.router_probs.view(groups, -1, experts).transpose(1, 2)
    chosen = torch.zeros(key.shape, dtype=torch.bool, device=key.device)
    chosen = chosen.scatter(2, best_first(key, capacity), True)
    check_rows(plan, chosen.transpose(1, 2).reshape(tokens, experts))
    return plan


def check_token_choice(
    logits: Tensor, top_k: int, affinity: str, groups: int, options: dict[str, Any]
) -> mk.RoutingPlan:
    plan = mk.token_choice(
        logits, top_k, affinity=affinity, num_groups=groups, check_finite=False, **options
    )
    key = ranking_key(plan.router_probs)
    if "selection_bias" in options:
        key = key + options["selection_bias"]
    if "top_k_groups" in options:
        key = keep_best_groups(key, options["num_expert_groups"], options["top_k_groups"])
    best = best_first(key, top_k)
    assert plan.expert_indices is not None
    assert torch.equal(plan.expert_indices.long(), best)
    chosen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    check_rows(plan, chosen.scatter(1, best, True))
    return plan


POOLS = [  # group size, experts, groups, capacity
    (1, 1, 1, 1),
    (1, 3, 2, 1),
    (37, 1, 1, 5),
    (50, 3, 2, 50),
    (129, 2, 1, 20),
    (66, 6, 2, 9),
]
CHOICES = [(kind, "softmax") for kind in KINDS]
CHOICES += [("ties", "sigmoid"), ("extreme", "sigmoid"), ("normal", "identity")]


def token_choice_cases() -> Iterator[tuple[int, int, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(5)
    for experts in (1, 3, 17, 130):
        for top_k in sorted({1, min(experts, 5)}):
            yield experts, top_k, {}
    yield 5, 5, {}
    for experts, groups, kept, top_k in ((64, 8, 3, 6), (130, 13, 2, 8), (6, 6, 2, 2)):
        options = {"num_expert_groups": groups, "top_k_groups": kept}
        yield experts, top_k, options
        bias = torch.randn(experts, generator=generator) * 0.2
        yield experts, top_k, {**options, "selection_bias": bias}
        yield experts, top_k, {"selection_bias": bias}


def upstream_of(value: Tensor) -> Tensor:
    return torch.linspace(-1, 2, value.numel()).cos().to(value).view_as(value)


def results(route: Any, logits: Tensor, name: str, options: dict[str, Any]) -> list[Tensor]:
    """The token of each row; then every result and its gradient."""
    leaf = logits.clone().requires_grad_()
    with mk.use_backend(name):
        plan = route(leaf, **options)
        found = [plan.token_indices]
        for result in RESULTS.values():
            value = result(plan)
            found.append(value)
            if value.requires_grad:  # only this one output of the routing op has a gradient
                found += torch.autograd.grad(value, leaf, upstream_of(value), retain_graph=True)
    return found


def check_results(route: str, logits: Tensor, name: str, options: dict[str, Any]) -> None:
    """Compare weights, losses, telemetry and the gradient of each with the reference in fp64."""
    cases = [(name, torch.float32), ("reference", torch.float32), ("reference", torch.float64)]
    found = [results(ROUTES[route], logits.to(dtype), who, options) for who, dtype in cases]
    assert len(found[0]) == 1 + len(RESULTS) + 7  # seven results have a gradient
    for actual, plain, exact in zip(*found, strict=True):
        if not exact.is_floating_point():
            assert torch.equal(actual, exact)
        elif float(exact.detach().abs().max()) < 1e-16:
            # Equal counts: terms of about 1 / T cancel, and the balance loss has no gradient.
            assert float(actual.detach().abs().max()) < 2e-6 / logits.shape[0]
        else:
            assert_as_accurate(actual, plain, exact)


def check_compiles(route: str, dynamic: bool) -> None:
    """Compare routing, losses and their gradient inside one compiled graph with eager calls."""

    def loss(logits: Tensor) -> tuple[Tensor, Tensor]:
        plan = ROUTES[route](logits, **PER_TOKEN)
        losses = mk.load_balance_loss(plan) + mk.router_z_loss(plan)
        return plan.token_indices, plan.routing_weights.square().sum() + losses

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (40, 60) if dynamic else (40,):
        found = []
        for function in (compiled, loss):
            logits = make_logits(tokens, 6).requires_grad_()
            indices, value = function(logits)
            found.append((indices, value, *torch.autograd.grad(value, logits)))
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected)
