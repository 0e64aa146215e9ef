"""Routing kernels of the CPU backend: selection exact, weights and losses as the reference's."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.backends.reference.affinity import ranking_key
from moe_kernels.backends.reference.token_choice import keep_best_groups
from moe_kernels.testing import LOGIT_KINDS, assert_as_accurate, make_logits, relative_error

from .routing_cases import PER_TOKEN, RESULTS, ROUTES

if (reason := BACKENDS["cpu"].why_not("expert_mlp", "cpu")) is not None:
    pytest.skip(f"the cpu backend {reason}", allow_module_level=True)

INF, NAN = float("inf"), float("nan")
AFFINITIES = ("softmax", "sigmoid", "identity")
# Vectors have 16 lanes, a sum covers 256 tokens, copied candidates start at 64.
NEAR_MULTIPLES = [n + d for n in (16, 32, 64, 256, 512) for d in (-1, 0, 1)]
SIZES = st.one_of(st.integers(1, 700), st.sampled_from(NEAR_MULTIPLES))


@pytest.fixture(autouse=True, scope="module")
def backend() -> Iterator[str]:
    with mk.use_backend("cpu"):
        yield "cpu"


def logits_of(kind: str, tokens: int, experts: int, seed: int, dtype: torch.dtype) -> Tensor:
    if kind != "duplicates":
        return make_logits(tokens, experts, kind, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(3, experts, generator=generator, dtype=torch.float64)
    return few[torch.randint(3, (tokens,), generator=generator)].to(dtype)


def best_first(key: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest of the last dimension, equal ones by rising index."""
    key = torch.where(torch.isnan(key), -INF, key.detach())
    return torch.sort(key, dim=-1, descending=True, stable=True).indices[..., :count]


def check_rows(plan: mk.RoutingPlan, chosen: Tensor) -> None:
    """Compare every index of a plan with the (T, E) 0/1 selection it has to describe."""
    expert, token = chosen.T.nonzero(as_tuple=True)
    assert torch.equal(plan.expert_of_row.long(), expert)
    counts = torch.nn.functional.pad(chosen.sum(0).cumsum(0), (1, 0))
    assert torch.equal(plan.expert_offsets.long(), counts)
    assert torch.equal(plan.tokens_per_expert.long(), chosen.sum(0))
    starts = torch.nn.functional.pad(chosen.sum(1).cumsum(0), (1, 0))
    assert torch.equal(plan.row_offsets.long(), starts)
    if plan.router == "token_choice" or plan.num_groups == 1:
        assert torch.equal(plan.token_indices.long(), token)
    row_of = torch.full(chosen.shape, -1)
    row_of[plan.token_indices.long(), plan.expert_of_row.long()] = torch.arange(plan.num_rows)
    assert torch.equal(row_of >= 0, chosen)
    assert torch.equal(plan.row_indices.long(), row_of[chosen])
    assert plan.fused is not None
    assert torch.equal(plan.packed_indices.row_experts.long(), chosen.nonzero()[:, 1])
    held = torch.bincount(chosen.sum(1), minlength=plan.num_experts + 1)
    assert torch.equal(plan.packed_indices.histogram.long(), held)


def check_expert_choice(logits: Tensor, capacity: int, groups: int, affinity: str) -> None:
    finite = bool(torch.isfinite(logits).all())
    plan = mk.expert_choice(
        logits, capacity=capacity, num_groups=groups, affinity=affinity, check_finite=finite
    )
    tokens, experts = logits.shape
    probs = plan.router_probs
    best = best_first(probs.view(groups, -1, experts).transpose(1, 2), capacity)
    chosen = torch.zeros(groups, experts, tokens // groups, dtype=torch.bool)
    chosen = chosen.scatter(2, best, True).transpose(1, 2).reshape(tokens, experts)
    check_rows(plan.validate(), chosen)
    weights = probs[plan.token_indices.long(), plan.expert_of_row.long()]
    torch.testing.assert_close(plan.routing_weights, weights, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=80, deadline=None)
@given(
    size=SIZES,
    experts=st.sampled_from([1, 2, 3, 8, 17]),
    groups=st.integers(1, 3),
    share=st.floats(0, 1),
    kind=st.sampled_from((*LOGIT_KINDS, "duplicates")),
    affinity=st.sampled_from(AFFINITIES),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_expert_choice_takes_the_best(size, experts, groups, share, kind, affinity, dtype, seed):
    logits = logits_of(kind, groups * size, experts, seed, dtype)
    check_expert_choice(logits, max(1, round(share * size)), groups, affinity)


@pytest.mark.parametrize("capacity", [1, 1333, 20000])
@pytest.mark.parametrize("kind", [*LOGIT_KINDS, "duplicates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_expert_choice_over_one_large_pool(capacity, kind, dtype):
    check_expert_choice(logits_of(kind, 20000, 3, 1, dtype), capacity, 1, "softmax")


def broken_logits(tokens: int, experts: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal logits with NaN and infinities strewn in, and a few rows of nothing else."""
    logits = make_logits(tokens, experts, "normal", seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    for value in (NAN, INF, -INF):
        logits[torch.rand(tokens, experts, generator=generator) < 0.08] = value
        logits[torch.randint(tokens, (1,), generator=generator)] = value
    return logits


@pytest.mark.parametrize("affinity", AFFINITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_non_finite_logits_are_ranked_as_by_the_reference(affinity, dtype, seed):
    logits = broken_logits(120, 5, dtype, seed)
    for capacity in (1, 11, 35, 60):
        check_expert_choice(logits, capacity, 2, affinity)
        options = {"capacity": capacity, "num_groups": 2, "affinity": affinity}
        plan = mk.expert_choice(logits, check_finite=False, **options)
        same = mk.expert_choice(logits, check_finite=False, backend="reference", **options)
        assert torch.equal(plan.token_indices, same.token_indices)
        assert torch.equal(plan.routing_weights.isnan(), same.routing_weights.isnan())
    if affinity == "identity":
        return
    for top_k in (1, 2, 5):
        options = {"affinity": affinity, "check_finite": False}
        plan = mk.token_choice(logits, top_k, **options).validate()
        same = mk.token_choice(logits, top_k, backend="reference", **options)
        assert torch.equal(plan.expert_indices, same.expert_indices)
        assert torch.equal(plan.routing_weights.isnan(), same.routing_weights.isnan())


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [(0, 0), (69, 2), (37, 1)])
@pytest.mark.parametrize("route", ["token_choice", "expert_choice"])
def test_non_finite_logits_are_refused_like_by_the_reference(value, place, route):
    logits = make_logits(70, 3)
    logits[place] = value
    messages = []
    for name in ("cpu", "reference"):
        with pytest.raises(ValueError, match="1 non-finite of 210 values") as error:
            getattr(mk, route)(logits, backend=name)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert str(place) in messages[0]


def token_choice_cases() -> Iterator[tuple[int, int, dict[str, Any]]]:
    for experts in (1, 3, 17, 64, 130):
        for top_k in sorted({1, min(2, experts), experts // 2 or 1, experts}):
            yield experts, top_k, {}
            yield experts, top_k, {"selection_bias": torch.randn(experts) * 0.2}
    for experts, groups, kept, top_k in (
        (64, 8, 3, 6),
        (130, 13, 2, 20),
        (6, 6, 2, 2),
        (8, 2, 1, 2),
    ):
        options = {"num_expert_groups": groups, "top_k_groups": kept}
        yield experts, top_k, options
        yield experts, top_k, {**options, "selection_bias": torch.randn(experts) * 0.2}


@pytest.mark.parametrize("affinity", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", ["normal", "collapsed"])
@pytest.mark.parametrize("tokens", [1, 45, 300])
def test_token_choice_takes_the_experts_of_the_reference(affinity, kind, tokens):
    for experts, top_k, options in token_choice_cases():
        logits = make_logits(tokens, experts, kind, dtype=torch.float64)
        plan = mk.token_choice(logits, top_k, affinity=affinity, **options).validate()
        same = mk.token_choice(logits, top_k, affinity=affinity, backend="reference", **options)
        assert torch.equal(plan.expert_indices, same.expert_indices)
        assert relative_error(plan.routing_weights, same.routing_weights) < 1e-13


@pytest.mark.parametrize("affinity", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", [*LOGIT_KINDS, "duplicates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_token_choice_ranks_by_its_own_affinities(affinity, kind, dtype):
    for experts, top_k, options in token_choice_cases():
        logits = logits_of(kind, 75, experts, 3, dtype)
        plan = mk.token_choice(logits, top_k, affinity=affinity, **options).validate()
        key = ranking_key(plan.router_probs)
        if "selection_bias" in options:
            key = key + options["selection_bias"].to(dtype)
        if "top_k_groups" in options:
            key = keep_best_groups(key, options["num_expert_groups"], options["top_k_groups"])
        best = best_first(key, top_k)
        assert torch.equal(plan.expert_indices.long(), best)
        check_rows(plan, torch.zeros(75, experts, dtype=torch.bool).scatter(1, best, True))
        weights = plan.router_probs[plan.token_indices.long(), plan.expert_of_row.long()]
        assert torch.equal(plan.routing_weights, weights)


def results(route: Any, logits: Tensor, name: str, options: dict[str, Any]) -> list[Tensor]:
    """The token of each row; then every result and its gradient, each from a plan of its own."""
    found = []
    with mk.use_backend(name):
        for result in RESULTS.values():
            leaf = logits.clone().requires_grad_()
            plan = route(leaf, **options)
            value = result(plan)
            found.append(value)
            if value.requires_grad:  # only this one output of the routing op is used
                upstream = torch.linspace(-1, 2, value.numel()).cos().to(value).view_as(value)
                found += torch.autograd.grad(value, leaf, upstream)
    return [plan.token_indices, *found]


@pytest.mark.parametrize(
    ("route", "options"),
    [
        (route, options)
        for route in ROUTES
        for options in ({}, PER_TOKEN, {"scale": 0.5})
        if route != "identity" or options is not PER_TOKEN  # these are not normalised
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [90, 540])
def test_weights_losses_and_gradients_equal_the_reference(route, options, tokens):
    logits = make_logits(tokens, 6)
    cases = [("cpu", torch.float64), ("reference", torch.float64)]
    cases += [("cpu", torch.float32), ("reference", torch.float32)]
    found = [results(ROUTES[route], logits.to(dtype), name, options) for name, dtype in cases]
    assert len(found[0]) == 1 + len(RESULTS) + 7  # seven results have a gradient
    for wide, exact, actual, plain in zip(*found, strict=True):
        if not exact.is_floating_point():
            assert torch.equal(wide, exact)
            assert torch.equal(actual, exact)
            continue
        if float(exact.detach().abs().max()) < 1e-16:
            # Equal counts: terms of about 1 / T cancel, and the balance loss has no gradient.
            assert float(wide.detach().abs().max()) < 1e-12 / tokens
            assert float(actual.detach().abs().max()) < 2e-6 / tokens
            continue
        assert relative_error(wide, exact) < 1e-12
        assert_as_accurate(actual, plain, exact)


def test_all_outputs_together_have_the_sum_of_the_gradients():
    logits = make_logits(90, 6, dtype=torch.float64).requires_grad_()
    plan = ROUTES["token_choice"](logits, **PER_TOKEN)
    values = [RESULTS[n](plan) for n in ("balance", "per_sequence", "counts", "z", "weights")]
    upstream = [torch.randn_like(value) for value in values]
    (together,) = torch.autograd.grad(values, logits, upstream, retain_graph=True)
    apart = [
        torch.autograd.grad(value, logits, gradient, retain_graph=True)[0]
        for value, gradient in zip(values, upstream, strict=True)
    ]
    assert relative_error(together, torch.stack(apart).sum(0)) < 1e-13
