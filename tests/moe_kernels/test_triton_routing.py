"""Routing kernels of the Triton backend in Triton's interpreter: selection exact, numbers accurate.

What is checked is in routing_checks.py. A program of the interpreter takes milliseconds, so inputs
are small and loops are made to turn by smaller chunks.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.testing import assert_as_accurate, make_logits

if (reason := BACKENDS["triton"].why_not("expert_choice", "cpu")) is not None:
    pytest.skip(f"the triton backend {reason}", allow_module_level=True)

from moe_kernels.backends.triton import expert_choice, expert_choice_long, route_losses

from .routing_cases import PER_TOKEN, RESULTS, ROUTES
from .routing_checks import (
    AFFINITIES,
    CHOICES,
    INF,
    NAN,
    POOLS,
    broken_logits,
    check_compiles,
    check_expert_choice,
    check_results,
    check_token_choice,
    logits_of,
    results,
    token_choice_cases,
    upstream_of,
)


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    torch._dynamo.reset()
    with mk.use_backend("triton"):
        yield "triton"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops over chunks of blocks, groups and pools turn several times on small inputs."""
    monkeypatch.setattr(route_losses, "_SCAN_ROWS", 2)
    monkeypatch.setattr(route_losses, "_rows", lambda columns: 2)
    monkeypatch.setattr(expert_choice, "_CHUNK", 64)
    monkeypatch.setattr(expert_choice_long, "CHUNK", 32)
    monkeypatch.setattr(expert_choice_long, "_ROWS", 2)
    monkeypatch.setattr(expert_choice_long, "_COUNTS", 2)


@pytest.fixture
def long_pools(monkeypatch: pytest.MonkeyPatch, small_chunks: None) -> None:
    """Every pool is too long for one program."""
    monkeypatch.setattr(expert_choice, "LONGEST_BLOCK", 0)


@pytest.mark.parametrize(("size", "experts", "groups", "capacity"), POOLS)
@pytest.mark.parametrize(("kind", "affinity"), CHOICES)
def test_expert_choice_takes_the_best(
    size, experts, groups, capacity, kind, affinity, small_chunks
):
    check_expert_choice(logits_of(kind, groups * size, experts), capacity, groups, affinity)


@pytest.mark.parametrize(("size", "experts", "groups", "capacity"), POOLS)
@pytest.mark.parametrize("kind", ["ties", "extreme"])
def test_expert_choice_from_pools_of_many_blocks(
    size, experts, groups, capacity, kind, long_pools, monkeypatch
):
    logits = logits_of(kind, groups * size, experts)
    plan = check_expert_choice(logits, capacity, groups, "softmax")
    monkeypatch.undo()  # in one block
    options = {"capacity": capacity, "num_groups": groups}
    same = mk.expert_choice(logits, **options)
    assert plan.fused is not None
    assert same.fused is not None
    assert torch.equal(plan.fused.packed, same.fused.packed)
    assert torch.equal(plan.routing_weights, same.routing_weights)


def test_counts_of_the_longest_block_fit_where_they_are_packed():
    size = expert_choice.LONGEST_BLOCK
    check_expert_choice(torch.zeros(size, 1), size, 1, "sigmoid")


@pytest.mark.parametrize(("kind", "affinity"), [c for c in CHOICES if c[1] != "identity"])
def test_token_choice_takes_the_best(kind, affinity, small_chunks):
    for experts, top_k, options in token_choice_cases():
        check_token_choice(logits_of(kind, 20, experts, 3), top_k, affinity, 1, options)


@pytest.mark.parametrize(("tokens", "groups"), [(1, 1), (3, 3), (130, 1), (390, 3)])
def test_token_choice_over_several_blocks_and_groups(tokens, groups, small_chunks):
    # 130 tokens are 5 blocks, more than the scan of a group takes at a time
    check_token_choice(logits_of("ties", tokens, 40), 2, "softmax", groups, {})


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_non_finite_logits_are_ranked_as_by_the_reference(affinity, small_chunks):
    logits = broken_logits(60, 5, seed=1)
    options = {"affinity": affinity, "check_finite": False}
    for capacity in (11, 30):
        plan = check_expert_choice(logits, capacity, 2, affinity)
        choice = {"capacity": capacity, "num_groups": 2, **options}
        same = mk.expert_choice(logits, backend="reference", **choice)
        assert torch.equal(plan.token_indices, same.token_indices)
        assert torch.equal(plan.routing_weights.isnan(), same.routing_weights.isnan())
    if affinity == "identity":
        return
    for top_k in (1, 2, 5):
        plan = check_token_choice(logits, top_k, affinity, 1, {})
        same = mk.token_choice(logits, top_k, backend="reference", **options)
        assert torch.equal(plan.expert_indices, same.expert_indices)
        assert torch.equal(plan.routing_weights.isnan(), same.routing_weights.isnan())
    groups = {"num_expert_groups": 5, "top_k_groups": 3}
    check_token_choice(logits, 2, affinity, 1, groups)


def test_infinite_logits_and_both_zeros_rank_as_floats(long_pools, monkeypatch):
    values = [0.0, -0.0, INF, -INF, NAN, 1e-45, -1e-45, 3e38, -3e38, -0.0, 0.0, NAN]
    logits = torch.tensor(values).unsqueeze(1)
    for capacity in (1, 4, 6, 8, 11):
        check_expert_choice(logits, capacity, 1, "identity")
    monkeypatch.undo()
    for capacity in range(1, len(values) + 1):
        check_expert_choice(logits, capacity, 1, "identity")


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("route", ["token_choice", "expert_choice"])
def test_non_finite_logits_are_refused_like_by_the_reference(value, route):
    logits = make_logits(70, 3)
    logits[37, 1] = value
    with pytest.raises(ValueError, match=r"1 non-finite of 210 values, the first .* \(37, 1\)"):
        getattr(mk, route)(logits)


@pytest.mark.parametrize(
    ("route", "options"),
    [
        (route, options)
        for route in ROUTES
        for options in ({}, PER_TOKEN)
        if route != "identity" or options is not PER_TOKEN  # these are not normalised
    ],
    ids=str,
)
def test_weights_losses_and_gradients_equal_the_reference(route, options, small_chunks):
    tokens = 270  # groups of two blocks, the second one short
    logits = make_logits(tokens, 6)
    check_results(route, logits, "triton", options)


@pytest.mark.parametrize("experts", [1, 2, 20, 70])
@pytest.mark.parametrize("router", ["token_choice", "expert_choice"])
def test_all_results_together_at_other_numbers_of_experts(router, experts):
    logits = make_logits(24, experts)

    def run(name: str, dtype: torch.dtype) -> list[Tensor]:
        leaf = logits.to(dtype).requires_grad_()
        with mk.use_backend(name):
            if router == "token_choice":
                plan = mk.token_choice(leaf, min(experts, 3), num_groups=2, **PER_TOKEN)
            else:
                plan = mk.expert_choice(leaf, min(experts, 2), **PER_TOKEN)
            values = [result(plan) for result in RESULTS.values()]
            values = [value for value in values if value.requires_grad]
            gradient = torch.autograd.grad(values, leaf, [upstream_of(value) for value in values])
        return [*values, *gradient]

    found = [run("triton", torch.float32), run("reference", torch.float32)]
    for actual, plain, exact in zip(*found, run("reference", torch.float64), strict=True):
        assert_as_accurate(actual, plain, exact)


@pytest.mark.parametrize("route", ROUTES)
def test_no_tokens(route):
    logits = torch.empty(0, 6, requires_grad=True)
    plan = ROUTES[route](logits).validate()
    for name in ("balance", "per_sequence", "z", "similarity", "mean_prob"):
        value = RESULTS[name](plan)
        assert torch.equal(value, torch.zeros_like(value)), name
    (gradient,) = torch.autograd.grad(plan.routing_weights.sum(), logits)
    assert gradient.shape == (0, 6)
    assert plan.router_probs.shape == (0, 6)
    assert plan.stats.experts_per_token_histogram.sum() == 0


def test_logits_need_not_be_contiguous():
    wide = make_logits(50, 12)
    for route in ROUTES.values():
        plan, same = route(wide[:, ::2]), route(wide[:, ::2].contiguous())
        assert torch.equal(plan.token_indices, same.token_indices)
        assert torch.equal(plan.routing_weights, same.routing_weights)


@pytest.mark.parametrize("route", ["token_choice", "expert_choice"])
def test_two_runs_have_the_same_bits(route):
    logits = make_logits(270, 6)
    first, second = (results(ROUTES[route], logits, "triton", {}) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("affinity", ["softmax", "sigmoid"])
def test_a_token_is_routed_alike_wherever_it_lies(affinity):
    logits = make_logits(140, 6)
    moved = logits.flip(0)
    plan = mk.token_choice(logits, 3, affinity=affinity)
    other = mk.token_choice(moved, 3, affinity=affinity)
    assert plan.expert_indices is not None
    assert other.expert_indices is not None
    assert torch.equal(plan.expert_indices, other.expert_indices.flip(0))
    assert torch.equal(plan.router_probs, other.router_probs.flip(0))


def op_samples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    tokens, experts = 24, 4
    logits = make_logits(tokens, experts).requires_grad_()
    plain = logits.detach()
    bias = torch.randn(experts) * 0.1
    yield "token_choice", (logits, None, 2, "softmax", False, 1.0, 1, 1, 2, True)
    yield "token_choice", (logits, bias, 2, "sigmoid", True, 2.5, 2, 1, 1, False)
    yield "expert_choice", (logits, 5, "softmax", False, 1.0, 2, True)
    yield "expert_choice", (logits, 5, "sigmoid", True, 2.5, 1, False)
    yield "affinity", (logits, "softmax")
    ops = torch.ops.moe_kernels
    weights, *_, packed = ops.expert_choice.triton(plain, 5, "softmax", True, 1.5, 2, True)
    scalar = torch.randn(())
    upstream = (torch.randn_like(weights), scalar, scalar, torch.randn(2 + experts))
    settings = (weights.shape[0], 2, "softmax", True, 1.5)
    for used in (upstream, (upstream[0], None, None, None), (None, scalar, None, None)):
        yield "route_bwd", (plain, packed, *used, *settings)
    plan = mk.token_choice(plain, 2)
    pairs = (plan.packed_indices.row_experts.clone(), plan.row_offsets.clone())
    yield "similarity", (logits, *pairs)
    yield "similarity_bwd", (plain, ops.similarity.triton(plain, *pairs)[1], scalar)


def test_opcheck():
    seen = set()
    for name, args in op_samples():
        opcheck(getattr(torch.ops.moe_kernels, name).triton, args)
        seen.add(name)
    assert len(seen) == 6


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("route", ["token_choice", "expert_choice"])
def test_compiles_to_one_graph(route, dynamic):
    check_compiles(route, dynamic)
