"""Routing against loop oracles, and the invariants that any routing keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_kernels as mk
from moe_kernels.testing import LOGIT_KINDS, assert_as_accurate, make_logits, relative_error

from . import oracles

# What the property tests draw from; test_triton_hypothesis.py draws a few examples of the same.
EXPERT_CHOICE = {
    "groups": st.integers(1, 4),
    "size": st.integers(1, 24),
    "experts": st.integers(1, 9),
    "factor": st.floats(0.05, 1.0),
    "kind": st.sampled_from(LOGIT_KINDS),
    "rounding": st.sampled_from(["floor", "ceil"]),
    "seed": st.integers(0, 99),
}
TOKEN_CHOICE = {
    "tokens": st.integers(0, 30),
    "experts": st.integers(1, 9),
    "data": st.data(),
    "kind": st.sampled_from(LOGIT_KINDS),
    "affinity": st.sampled_from(["softmax", "sigmoid"]),
    "seed": st.integers(0, 99),
}
BATCHES = {
    "batch": st.integers(2, 6),
    "seed": st.integers(0, 99),
    "kind": st.sampled_from(LOGIT_KINDS),
}


def rows_of(plan: mk.RoutingPlan) -> list[tuple[int, int]]:
    return list(zip(plan.expert_of_row.tolist(), plan.token_indices.tolist(), strict=True))


def backend_probs(plan: mk.RoutingPlan, affinity: str) -> torch.Tensor:
    """The affinities that the plan was selected by, once they are known to be right."""
    exact = oracles.affinity(plan.router_logits.double(), affinity)
    plain = oracles.affinity(plan.router_logits, affinity)
    assert_as_accurate(plan.router_probs, plain, exact)
    return plan.router_probs


@pytest.mark.parametrize("kind", LOGIT_KINDS)
@pytest.mark.parametrize("affinity", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize(("groups", "size", "experts"), [(1, 7, 3), (3, 16, 4), (5, 1, 1)])
def test_expert_choice_equals_the_oracle(kind, affinity, groups, size, experts):
    logits = make_logits(groups * size, experts, kind)
    capacity = min(size, max(1, size // 2))
    plan = mk.expert_choice(
        logits, capacity=capacity, num_groups=groups, affinity=affinity
    ).validate()
    probs = backend_probs(plan, affinity)
    expected = oracles.expert_choice_rows(probs, capacity, groups)
    assert rows_of(plan) == expected
    weights = torch.stack([probs[token, expert] for expert, token in expected])
    torch.testing.assert_close(plan.routing_weights, weights, rtol=0, atol=0)


@pytest.mark.parametrize("kind", LOGIT_KINDS)
@pytest.mark.parametrize("affinity", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(9, 5, 2), (6, 4, 4), (4, 1, 1)])
def test_token_choice_equals_the_oracle(kind, affinity, tokens, experts, top_k):
    logits = make_logits(tokens, experts, kind)
    plan = mk.token_choice(logits, top_k, affinity=affinity).validate()
    probs = backend_probs(plan, affinity)
    expected = oracles.token_choice_rows(probs, top_k)
    assert rows_of(plan) == expected
    weights = torch.stack([probs[token, expert] for expert, token in expected])
    torch.testing.assert_close(plan.routing_weights, weights, rtol=0, atol=0)


def test_expert_indices_fall_in_affinity_with_ties_to_the_lower_expert():
    plan = mk.token_choice(torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]]), 3)
    assert plan.expert_indices.tolist() == [[1, 2, 3], [0, 1, 2]]


@settings(max_examples=60, deadline=None)
@given(**EXPERT_CHOICE)
def test_expert_choice_invariants(groups, size, experts, factor, kind, rounding, seed):
    logits = make_logits(groups * size, experts, kind, seed)
    capacity_factor = factor * experts
    plan = mk.expert_choice(logits, capacity_factor, num_groups=groups, rounding=rounding)
    plan.validate()
    capacity = mk.expert_capacity(size, experts, capacity_factor, rounding=rounding)
    assert 1 <= capacity <= size
    assert plan.tokens_per_expert.tolist() == [groups * capacity] * experts
    assert plan.num_rows == experts * groups * capacity
    assert int(plan.experts_per_token.sum()) == plan.num_rows
    # Every expert's worst chosen token is at least as good as its best token left behind.
    probs = plan.router_probs.view(groups, size, experts)
    chosen = torch.zeros(groups, size, experts, dtype=torch.bool)
    token = plan.token_indices.long()
    chosen[token // size, token % size, plan.expert_of_row.long()] = True
    worst_in = probs.masked_fill(~chosen, 2.0).amin(1)
    best_out = probs.masked_fill(chosen, -1.0).amax(1)
    assert bool((worst_in >= best_out).all())


@settings(max_examples=40, deadline=None)
@given(**TOKEN_CHOICE)
def test_token_choice_invariants(tokens, experts, data, kind, affinity, seed):
    top_k = data.draw(st.integers(1, experts))
    logits = make_logits(tokens, experts, kind, seed)
    plan = mk.token_choice(logits, top_k, affinity=affinity).validate()
    # Every token's worst chosen expert is at least as good as its best one left behind.
    chosen = torch.zeros(tokens, experts, dtype=torch.bool)
    chosen = chosen.scatter(1, plan.expert_indices.long(), True)
    probs = plan.router_probs
    worst_in = probs.masked_fill(~chosen, 2.0).amin(1)
    best_out = probs.masked_fill(chosen, -1.0).amax(1)
    assert bool((worst_in >= best_out).all())
    assert plan.num_rows == tokens * top_k
    assert int(plan.tokens_per_expert.sum()) == plan.num_rows
    assert plan.tokens_per_expert.max() <= tokens


@settings(max_examples=30, deadline=None)
@given(**BATCHES)
def test_routing_of_an_image_does_not_depend_on_its_batch(batch, seed, kind):
    size, experts = 12, 4
    logits = make_logits(batch * size, experts, kind, seed)
    whole = mk.expert_choice(logits, num_groups=batch)
    tokens = whole.token_indices.view(experts, batch, -1)
    weights = whole.routing_weights.view(experts, batch, -1)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    permuted = mk.expert_choice(
        logits.view(batch, size, experts)[order].flatten(0, 1), num_groups=batch
    )
    for place, image in enumerate(order.tolist()):
        alone = mk.expert_choice(logits[image * size : (image + 1) * size])
        inside = tokens[:, image] - image * size
        assert torch.equal(alone.token_indices.view(experts, -1), inside)
        assert torch.equal(
            permuted.token_indices.view(experts, batch, -1)[:, place] - place * size, inside
        )
        assert torch.equal(alone.routing_weights.view(experts, -1), weights[:, image])


@pytest.mark.parametrize(
    ("experts", "expected"), [(8, 64), (16, 32), (32, 16), (64, 8)], ids=lambda value: str(value)
)
def test_capacity_of_the_paper(experts, expected):
    assert mk.expert_capacity(256, experts, 2.0) == expected


def test_capacity_rounding():
    assert mk.expert_capacity(256, 64, 0.1) == 1  # f_c · S / E < 1
    assert mk.expert_capacity(10, 4, 1.0) == 2
    assert mk.expert_capacity(10, 4, 1.0, rounding="ceil") == 3
    assert mk.expert_capacity(100, 8, 2.0, multiple_of=16) == 32
    assert mk.expert_capacity(0, 8, 2.0) == 0
    # Products that floating point misses by one bit
    assert mk.expert_capacity(100, 10, 1.1, rounding="ceil") == 11
    assert mk.expert_capacity(100, 1, 0.29) == 29


def test_full_capacity_routes_every_token_to_every_expert():
    plan = mk.expert_choice(make_logits(12, 3), 3.0, num_groups=2).validate()
    assert plan.experts_per_token.tolist() == [3] * 12


@pytest.mark.parametrize("affinity", ["softmax", "sigmoid"])
def test_per_token_weights_sum_to_the_scale(affinity):
    for plan in (
        mk.expert_choice(make_logits(20, 4), affinity=affinity, normalize="per_token", scale=2.5),
        mk.token_choice(make_logits(20, 4), 2, affinity=affinity, normalize="per_token", scale=2.5),
    ):
        sums = torch.zeros(20).index_add(0, plan.token_indices, plan.routing_weights)
        held = plan.experts_per_token > 0
        torch.testing.assert_close(sums[held], torch.full_like(sums[held], 2.5))
        assert bool((sums[~held] == 0).all())


def test_underflowed_affinities_give_zero_weights_not_nan():
    logits = torch.full((4, 2), -200.0)
    logits.requires_grad_()
    for plan in (
        mk.token_choice(logits, 2, affinity="sigmoid", normalize="per_token"),
        mk.expert_choice(logits, 1.0, affinity="sigmoid", normalize="per_token"),
    ):
        assert plan.routing_weights.tolist() == [0.0] * plan.num_rows
        upstream = torch.randn_like(plan.routing_weights)
        (gradient,) = torch.autograd.grad(plan.routing_weights, logits, upstream)
        assert bool(torch.isfinite(gradient).all())


def test_selection_bias_moves_the_choice_but_not_the_weight():
    logits = make_logits(16, 4)
    bias = torch.tensor([-10.0, 0.0, 0.0, 10.0])
    plan = mk.token_choice(logits, 1, affinity="sigmoid", selection_bias=bias)
    assert plan.expert_indices.tolist() == [[3]] * 16
    assert torch.equal(plan.routing_weights, plan.router_probs[:, 3])


def test_group_limited_selection_keeps_the_best_groups():
    probs = torch.tensor([[0.9, 0.0, 0.5, 0.6, 0.3, 0.35]])  # pairs: 0.9, 1.1, 0.65
    plan = mk.token_choice(
        torch.logit(probs, eps=1e-6), 2, affinity="sigmoid", num_expert_groups=3, top_k_groups=1
    ).validate()
    assert plan.expert_indices.tolist() == [[3, 2]]
    two = mk.token_choice(
        torch.logit(probs, eps=1e-6), 3, affinity="sigmoid", num_expert_groups=3, top_k_groups=2
    )
    assert two.expert_indices.tolist() == [[0, 3, 2]]


def test_nan_ranks_last():
    logits = torch.tensor([[float("nan")], [-5.0], [1.0], [float("-inf")]])
    plan = mk.expert_choice(logits, capacity=2, affinity="identity", check_finite=False)
    assert plan.token_indices.tolist() == [1, 2]
    row = torch.tensor([[float("nan"), 0.0, 1.0]])
    chosen = mk.token_choice(row, 2, affinity="sigmoid", check_finite=False)
    assert chosen.expert_indices.tolist() == [[2, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_routed_in_fp32(dtype):
    logits = make_logits(32, 4).to(dtype)
    plan = mk.expert_choice(logits, num_groups=2)
    assert plan.routing_weights.dtype == torch.float32
    assert torch.equal(
        plan.token_indices, mk.expert_choice(logits.float(), num_groups=2).token_indices
    )


def test_non_contiguous_logits_route_like_contiguous_ones():
    logits = make_logits(4, 24).T  # (24, 4), strided
    a, b = (
        mk.expert_choice(logits, num_groups=2),
        mk.expert_choice(logits.contiguous(), num_groups=2),
    )
    assert torch.equal(a.token_indices, b.token_indices)
    c, d = mk.token_choice(logits, 2), mk.token_choice(logits.contiguous(), 2)
    assert torch.equal(c.token_indices, d.token_indices)


@pytest.mark.parametrize(
    ("affinity", "normalize"),
    [
        ("softmax", "none"),
        ("softmax", "per_token"),
        ("sigmoid", "none"),
        ("sigmoid", "per_token"),
        ("identity", "none"),
    ],
)
def test_gradient_of_routing_weights(affinity, normalize):
    logits = make_logits(12, 3, dtype=torch.float64).requires_grad_()

    def expert_weights(router_logits):
        return mk.expert_choice(
            router_logits, num_groups=2, affinity=affinity, normalize=normalize, scale=1.5
        ).routing_weights

    assert torch.autograd.gradcheck(expert_weights, (logits,))
    if affinity != "identity":
        assert torch.autograd.gradcheck(
            lambda router_logits: (
                mk.token_choice(
                    router_logits, 2, affinity=affinity, normalize=normalize, scale=1.5
                ).routing_weights
            ),
            (logits,),
        )


def test_two_runs_are_equal_bit_for_bit():
    logits = make_logits(512, 8).requires_grad_()
    upstream = torch.randn(1024)
    results = []
    for _ in range(2):
        plan = mk.expert_choice(logits, num_groups=4, normalize="per_token")
        (gradient,) = torch.autograd.grad(plan.routing_weights, logits, upstream)
        results.append((plan.routing_weights, gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert relative_error(results[0][0], results[1][0]) == 0.0
