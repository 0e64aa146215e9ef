"""Routing kernels of the CUDA backend on a simulated GPU: their source, compiled for the host.

What is checked is in routing_checks.py. The simulated GPU is small, so that few tokens already fill
several blocks, and runs the threads of a block in any order that a test asks for.
"""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.testing import LOGIT_KINDS, assert_as_accurate, make_logits

if (reason := BACKENDS["cuda"].why_not("expert_choice", "cpu")) is not None:
    pytest.skip(f"the cuda backend {reason}", allow_module_level=True)

from moe_kernels.backends.cuda import native
from moe_kernels.backends.cuda import route as cuda_route

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

simulate = native.native.simulate
# Teams of csrc/cuda/kernels.hpp: blocks of a cluster, of the grid, and the grid in each pool.
TEAMS = {"automatic": 0, "cluster": 1, "grid": 2, "chunks": 3}
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}
WITH_SIMILARITY = "cuda,cpu"


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    torch._dynamo.reset()
    simulate()
    with mk.use_backend(WITH_SIMILARITY):
        yield "cuda"
    simulate()


@pytest.fixture(params=TEAMS)
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cuda_route, "TEAM", TEAMS[request.param])
    return request.param


def bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().view(torch.int32)


# More groups than one cluster takes, pools of several words and chunks, experts of several lanes.
MORE_POOLS = [(300, 8, 3, 70), (97, 40, 9, 13), (40, 130, 1, 5), (20, 250, 2, 3), (1100, 2, 2, 200)]


@pytest.mark.parametrize(("kind", "affinity"), CHOICES)
def test_expert_choice_takes_the_best(kind, affinity, team):
    for size, experts, groups, capacity in POOLS:
        check_expert_choice(logits_of(kind, groups * size, experts), capacity, groups, affinity)


@pytest.mark.parametrize(("size", "experts", "groups", "capacity"), MORE_POOLS)
def test_expert_choice_over_several_blocks_and_words(size, experts, groups, capacity, team):
    check_expert_choice(logits_of("ties", groups * size, experts), capacity, groups, "softmax")


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_pools_that_no_block_holds(affinity):
    size, experts, groups = 16385, 2, 2
    for kind, capacity in (("normal", 5000), ("ties", 100), ("duplicates", size)):
        check_expert_choice(logits_of(kind, groups * size, experts), capacity, groups, affinity)


@pytest.mark.parametrize("size", [1024, 1025, 16384])
def test_both_sides_of_the_limits_between_kernels(size):
    logits = logits_of("ties", size, 3)
    for capacity in (1, 77, size):
        check_expert_choice(logits, capacity, 1, "softmax")


# Blocks begin in the middle of a pool, and read what those before them found.
SHARED_POOLS = [(300, 5, 1, 70), (97, 7, 3, 13), (1100, 1, 2, 200)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("size", "experts", "groups", "capacity"), SHARED_POOLS)
def test_any_order_of_threads_takes_the_best(size, experts, groups, capacity, order, team):
    simulate(order=ORDERS[order], seed=5)
    for kind in ("normal", "ties"):
        check_expert_choice(logits_of(kind, groups * size, experts), capacity, groups, "softmax")


def close_logits(tokens: int) -> Tensor:
    """Neighbouring floats from 1 upwards for one expert, in any order."""
    steps = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))
    one = torch.ones(tokens, dtype=torch.float32).view(torch.int32)
    return (one + steps.int()).view(torch.float32).unsqueeze(1)


@pytest.mark.parametrize("order", ORDERS)
def test_keys_that_differ_in_their_last_bits_alone(order, team):
    simulate(order=ORDERS[order], seed=5)
    for size, capacity in ((200, 70), (1100, 200)):
        check_expert_choice(close_logits(size), capacity, 1, "identity")
        check_expert_choice(-close_logits(size), capacity, 1, "identity")


@pytest.mark.parametrize("outlier", [3e38, -3e38])
@pytest.mark.parametrize("token", [0, 1023])  # of the first and of the last warp of a block
def test_one_warp_alone_has_an_extreme_key(outlier, token, team):
    logits = close_logits(1100)
    logits[token] = outlier
    for capacity in (1, 200, 1099):
        check_expert_choice(logits, capacity, 1, "identity")


def test_every_team_has_the_same_indices(monkeypatch):
    logits = make_logits(600, 6, "ties")
    found = []
    for team in TEAMS.values():
        monkeypatch.setattr(cuda_route, "TEAM", team)
        plan = mk.expert_choice(logits, num_groups=2, normalize="per_token")
        assert plan.fused is not None
        found.append((plan.fused.packed, bits(plan.routing_weights)))
    for indices, weights in found[1:]:
        assert torch.equal(indices, found[0][0])
        assert torch.equal(weights, found[0][1])


@pytest.mark.parametrize(("kind", "affinity"), [c for c in CHOICES if c[1] != "identity"])
def test_token_choice_takes_the_best(kind, affinity):
    for experts, top_k, options in token_choice_cases():
        check_token_choice(logits_of(kind, 20, experts, 3), top_k, affinity, 1, options)


@pytest.mark.parametrize(
    ("tokens", "groups"), [(1, 1), (3, 3), (130, 1), (390, 3), (1000, 200), (3000, 2), (8500, 1)]
)
@pytest.mark.parametrize("experts", [3, 40, 200])
def test_token_choice_over_several_blocks_and_groups(tokens, groups, experts):
    check_token_choice(logits_of("ties", tokens, experts), 2, "softmax", groups, {})


@pytest.mark.parametrize("processors", [1, 2, 7])
def test_token_choice_on_any_number_of_processors(processors):
    simulate(processors=processors, blocks_per_processor=2)
    check_token_choice(logits_of("ties", 2000, 8), 2, "softmax", 4, {})


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_non_finite_logits_are_ranked_as_by_the_reference(affinity, team):
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


def test_infinite_logits_and_both_zeros_rank_as_floats(team):
    values = [0.0, -0.0, INF, -INF, NAN, 1e-45, -1e-45, 3e38, -3e38, -0.0, 0.0, NAN]
    logits = torch.tensor(values).unsqueeze(1)
    for capacity in range(1, len(values) + 1):
        check_expert_choice(logits, capacity, 1, "identity")


def test_nan_is_never_selected_while_there_is_anything_else(team):
    logits = torch.full((40, 1), NAN)
    logits[30:] = -torch.arange(10.0).unsqueeze(1)
    plan = mk.expert_choice(logits, capacity=10, affinity="identity", check_finite=False)
    assert plan.token_indices.tolist() == list(range(30, 40))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("route", ["token_choice", "expert_choice"])
def test_non_finite_logits_are_refused_when_asked(value, route):
    logits = make_logits(70, 3)
    logits[37, 1] = value
    with pytest.raises(ValueError, match=r"1 non-finite of 210 values, the first .* \(37, 1\)"):
        getattr(mk, route)(logits)
    getattr(mk, route)(logits, check_finite=False)
    getattr(mk, route)(make_logits(70, 3), check_finite=True)


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
@pytest.mark.parametrize("experts", [6, 40])
def test_weights_losses_and_gradients_equal_the_reference(route, options, experts, team):
    check_results(route, make_logits(270, experts), WITH_SIMILARITY, options)


@pytest.mark.parametrize("processors", [1, 16])
@pytest.mark.parametrize("route", ROUTES)
def test_results_on_any_number_of_processors(route, processors, team):
    # On 16 each group has a team of its own, and sums of several teams are added up.
    simulate(processors=processors, blocks_per_processor=2)
    check_results(route, make_logits(270, 6), WITH_SIMILARITY, {})


def test_results_of_more_chunks_than_a_warp_has_lanes():
    simulate(processors=64)
    check_results("token_choice", make_logits(1200, 20), WITH_SIMILARITY, {})


@pytest.mark.parametrize("experts", [1, 2, 20, 70, 130, 200])
@pytest.mark.parametrize("router", ["token_choice", "expert_choice"])
@pytest.mark.parametrize("affinity", ["softmax", "sigmoid"])
def test_all_results_together_at_other_numbers_of_experts(affinity, router, experts):
    options = {"affinity": affinity, **PER_TOKEN}
    logits = make_logits(24, experts)

    def run(name: str, dtype: torch.dtype) -> list[Tensor]:
        leaf = logits.to(dtype).requires_grad_()
        with mk.use_backend(name):
            if router == "token_choice":
                plan = mk.token_choice(leaf, min(experts, 3), num_groups=2, **options)
            else:
                plan = mk.expert_choice(leaf, min(experts, 2), **options)
            values = [result(plan) for result in RESULTS.values()]
            values = [value for value in values if value.requires_grad]
            gradient = torch.autograd.grad(values, leaf, [upstream_of(value) for value in values])
        return [*values, *gradient]

    found = [run(WITH_SIMILARITY, torch.float32), run("reference", torch.float32)]
    for actual, plain, exact in zip(*found, run("reference", torch.float64), strict=True):
        assert_as_accurate(actual, plain, exact)


@pytest.mark.parametrize(
    ("router", "size"), [("token_choice", {"top_k": 2}), ("expert_choice", {"capacity": 20})]
)
def test_tokens_whose_affinities_all_underflow_have_gradient_zero(router, size):
    logits = make_logits(20, 6)
    logits[5:15] = -200.0
    found = []
    cases = [(WITH_SIMILARITY, torch.float32), ("reference", torch.float32)]
    for name, dtype in (*cases, ("reference", torch.float64)):
        leaf = logits.to(dtype).requires_grad_()
        with mk.use_backend(name):
            plan = getattr(mk, router)(leaf, affinity="sigmoid", **size, **PER_TOKEN)
        loss = plan.routing_weights.cos().sum() + mk.load_balance_loss(plan)
        found.append(torch.autograd.grad(loss, leaf)[0])
        if dtype == torch.float32:
            assert int((plan.routing_weights == 0).sum()) >= 10
    actual, plain, exact = found
    assert not bool(actual[5:15].any())
    assert not bool(plain[5:15].any())
    for rows in (slice(0, 5), slice(15, 20)):  # in fp64 the others do not underflow
        assert_as_accurate(actual[rows], plain[rows], exact[rows])


@pytest.mark.parametrize("route", ROUTES)
def test_no_tokens(route, team):
    logits = torch.empty(0, 6, requires_grad=True)
    plan = ROUTES[route](logits).validate()
    for name in ("balance", "per_sequence", "z", "mean_prob"):
        value = RESULTS[name](plan)
        assert torch.equal(value, torch.zeros_like(value)), name
    (gradient,) = torch.autograd.grad(plan.routing_weights.sum(), logits)
    assert gradient.shape == (0, 6)
    assert plan.router_probs.shape == (0, 6)
    assert plan.stats.experts_per_token_histogram.sum() == 0


def test_logits_need_not_be_contiguous_or_aligned():
    wide = make_logits(51, 16)
    for route in ROUTES.values():
        plan, same = route(wide[:50, ::2]), route(wide[:50, ::2].contiguous())
        shifted = torch.empty(50 * 8 + 1)[1:].view(50, 8).copy_(wide[:50, ::2])
        assert shifted.data_ptr() % 16 != 0
        other = route(shifted)
        for found in (plan, other):
            assert torch.equal(found.token_indices, same.token_indices)
            assert torch.equal(bits(found.routing_weights), bits(same.routing_weights))


@pytest.mark.parametrize("experts", [6, 8, 40])
@pytest.mark.parametrize("route", ["token_choice", "expert_choice"])
def test_nothing_beside_the_logits_is_read(route, experts, team):
    wide = torch.full((272, experts), NAN)
    logits = wide[1:-1].copy_(make_logits(270, experts))
    assert logits.is_contiguous()
    plan, same = ROUTES[route](logits, check_finite=True), ROUTES[route](logits.clone())
    assert torch.equal(plan.token_indices, same.token_indices)
    for name in ("weights", "probs", "balance", "z"):
        assert torch.equal(bits(RESULTS[name](plan)), bits(RESULTS[name](same))), name


def test_more_experts_than_the_kernels_take_go_to_the_reference():
    experts = native.native.MOST_EXPERTS
    assert mk.token_choice(make_logits(4, experts), 2).backend == "cuda"
    assert mk.token_choice(make_logits(4, experts + 1), 2).backend == "reference"
    assert mk.expert_choice(make_logits(4, experts).double()).backend == "reference"


@pytest.mark.parametrize("route", ROUTES)
def test_the_order_of_threads_changes_no_bit(route, team):
    logits = make_logits(270, 6, "ties")
    found = []
    for name, order in ORDERS.items():
        simulate(order=order, seed=7)
        found.append((name, results(ROUTES[route], logits, WITH_SIMILARITY, {})))
    for name, other in found[1:]:
        for one, two in zip(found[0][1], other, strict=True):
            assert torch.equal(bits(one), bits(two)), name


@pytest.mark.parametrize("route", ["token_choice", "expert_choice"])
def test_the_order_of_threads_changes_no_bit_with_many_experts(route):
    logits = make_logits(130, 150, "ties")
    found = []
    for order in ORDERS.values():
        simulate(order=order, seed=3)
        found.append(results(ROUTES[route], logits, WITH_SIMILARITY, PER_TOKEN))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(bits(one), bits(two))


@pytest.mark.parametrize("affinity", ["softmax", "sigmoid"])
def test_a_token_is_routed_alike_wherever_it_lies(affinity):
    logits = make_logits(140, 6)
    plan = mk.token_choice(logits, 3, affinity=affinity)
    other = mk.token_choice(logits.flip(0), 3, affinity=affinity)
    assert plan.expert_indices is not None
    assert other.expert_indices is not None
    assert torch.equal(plan.expert_indices, other.expert_indices.flip(0))
    assert torch.equal(plan.router_probs, other.router_probs.flip(0))


def launches(call: Any) -> int:
    before = native.native.launches()
    call()
    return native.native.launches() - before


def test_one_launch_a_router():
    logits = make_logits(600, 6).requires_grad_()
    assert launches(lambda: mk.expert_choice(logits, num_groups=2, check_finite=False)) == 1
    assert launches(lambda: mk.token_choice(logits, 2, normalize="per_token")) == 1
    assert launches(lambda: mk.expert_choice(make_logits(16400, 2))) == 1
    plan = mk.expert_choice(logits)
    loss = plan.routing_weights.sum() + mk.load_balance_loss(plan) + mk.router_z_loss(plan)
    assert launches(loss.backward) == 1


def test_counters_are_left_at_zero():
    for order in ORDERS.values():
        simulate(order=order)
        mk.expert_choice(make_logits(900, 6), num_groups=9)
        mk.token_choice(make_logits(900, 6), 2)
    (page,) = native.counters.pages[0]
    assert page <= native.counters.take((0, 0)) < page + 4 * native.PAGE
    assert not any((ctypes.c_uint32 * native.PAGE).from_address(page))


def test_a_launch_that_cannot_start_names_the_kernel():
    simulate(shared_bytes=1000)
    with pytest.raises(ValueError, match=r"kernel token_choice_fwd: \d+ bytes of shared memory"):
        mk.token_choice(make_logits(64, 8), 2)


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["8.0"], (8, 0), True),
        (["8.0"], (8, 9), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (10, 0), False),
        (["8.0", "12.0+PTX"], (12, 1), True),
        (["12.0+PTX"], (10, 0), False),
        ([], (9, 0), False),
    ],
)
def test_archs_tell_which_gpus_they_run_on(archs, capability, runs):
    assert native.runs_on(archs, capability) is runs


ROUTER = {
    "groups": st.integers(1, 5),
    "size": st.integers(1, 90),
    "experts": st.integers(1, 40),
    "share": st.floats(0.01, 1.0),
    "kind": st.sampled_from((*LOGIT_KINDS, "duplicates")),
    "affinity": st.sampled_from(["softmax", "sigmoid"]),
    "order": st.sampled_from(list(ORDERS.values())),
    "seed": st.integers(0, 99),
}


@settings(max_examples=60, deadline=None)
@given(team=st.sampled_from(list(TEAMS.values())), **ROUTER)
def test_any_expert_choice(team, groups, size, experts, share, kind, affinity, order, seed):
    simulate(order=order, seed=seed)
    previous, cuda_route.TEAM = cuda_route.TEAM, team
    try:
        capacity = max(1, round(size * share))
        check_expert_choice(
            logits_of(kind, groups * size, experts, seed), capacity, groups, affinity
        )
    finally:
        cuda_route.TEAM = previous


@settings(max_examples=60, deadline=None)
@given(**ROUTER)
def test_any_token_choice(groups, size, experts, share, kind, affinity, order, seed):
    simulate(order=order, seed=seed)
    top_k = max(1, round(experts * share))
    logits = logits_of(kind, groups * size, experts, seed)
    check_token_choice(logits, top_k, affinity, groups, {})


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
    weights, *_, packed = ops.expert_choice.cuda(plain, 5, "softmax", True, 1.5, 2, True)
    scalar = torch.randn(())
    upstream = (torch.randn_like(weights), scalar, scalar, torch.randn(2 + experts))
    settings = (weights.shape[0], 2, "softmax", True, 1.5)
    for used in (upstream, (upstream[0], None, None, None), (None, scalar, None, None)):
        yield "route_bwd", (plain, packed, *used, *settings)


def test_opcheck():
    seen = set()
    for name, args in op_samples():
        opcheck(getattr(torch.ops.moe_kernels, name).cuda, args)
        seen.add(name)
    assert len(seen) == 4


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("route", ["token_choice", "expert_choice"])
def test_compiles_to_one_graph(route, dynamic):
    check_compiles(route, dynamic)
