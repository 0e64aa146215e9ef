"""Counts against an oracle that walks through every row of every plan."""

import math

import numpy as np
import pytest
import torch

import moe_kernels as mk
from dit_models.analyze.counts import RoutingCounts, by_token, check_plans, token_entropy

from .plans import EXPERTS, IMAGES, KINDS, TOKENS, Oracle, assert_same, rows_of

LAYERS, STEPS, GROUPS = 2, 3, 2


def count(counts: RoutingCounts, step: int, layer: int, plan, groups: list[int]) -> None:
    table = by_token(plan, len(groups), TOKENS)
    entropy = token_entropy(plan, len(groups), TOKENS)
    counts.add(step, layer, table, entropy, torch.tensor(groups))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_equal_the_oracle(kind, guided):
    counts = RoutingCounts(LAYERS, EXPERTS, STEPS, TOKENS, GROUPS)
    oracle = Oracle(LAYERS, STEPS, GROUPS)
    for groups in ([1, 0, 1], [1, 1, 1]):  # two batches
        for step in range(STEPS):
            for layer in range(LAYERS):
                plan = KINDS[kind](IMAGES * (2 if guided else 1))
                count(counts, step, layer, plan, groups)
                oracle.add(step, layer, plan, groups)
        counts.add_images(torch.tensor(groups))
        np.add.at(oracle.images_by_group, groups, 1)
    assert_same(counts, oracle)
    assert counts.num_images == 2 * IMAGES
    # What every count adds up to.
    assert counts.tokens_by_count.sum() == 2 * IMAGES * TOKENS * STEPS * LAYERS
    assert torch.equal(counts.rows_by_group.sum(1), counts.rows_by_step.sum(0))
    assert torch.equal(counts.rows_by_position.sum(1), counts.rows_by_step.sum(0))
    assert torch.equal(counts.pairs.diagonal(dim1=1, dim2=2), counts.rows_by_step.sum(0))


@pytest.mark.parametrize("kind", ["token_choice", "ragged"])
def test_merging_batches_is_exact(kind):
    """One count of all images, and the sum of counts of every batch, are the same integers."""
    together = RoutingCounts(1, EXPERTS, 1, TOKENS, GROUPS)
    merged = RoutingCounts(1, EXPERTS, 1, TOKENS, GROUPS)
    for groups in ([0, 1, 1], [1], [0, 0]):
        plan = KINDS[kind](len(groups))
        alone = RoutingCounts(1, EXPERTS, 1, TOKENS, GROUPS)
        for counts in (together, alone):
            count(counts, 0, 0, plan, groups)
            counts.add_images(torch.tensor(groups))
        merged.merge(alone)
    for name in vars(together):
        if isinstance(getattr(together, name), torch.Tensor):
            assert torch.equal(getattr(together, name), getattr(merged, name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_tables_hold_each_row_once(kind):
    plan = KINDS[kind](IMAGES)
    table = by_token(plan, IMAGES, TOKENS)
    assert int(table.chosen.sum()) == plan.num_rows
    for token, expert, weight in rows_of(plan):
        where = (token // TOKENS, token % TOKENS, expert)
        assert table.chosen[where] == 1
        assert table.weights[where] == weight
    assert (table.weights[table.chosen == 0] == 0).all()


def test_entropy_of_known_distributions():
    probs = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25] * 4, [1.0, 0, 0, 0], [0.7, 0.1, 0.1, 0.1]])
    expected = [1.5 * math.log(2), math.log(4), 0.0, -(0.7 * math.log(0.7) + 0.3 * math.log(0.1))]
    softmax = mk.token_choice(probs.clamp_min(1e-30).log(), 1)
    sigmoid = mk.token_choice((probs * 0.5).clamp_min(1e-30).logit(), 1, affinity="sigmoid")
    for plan in (softmax, sigmoid):
        entropy = token_entropy(plan, 2, 2)
        assert entropy.shape == (2, 2)
        torch.testing.assert_close(entropy.flatten(), torch.tensor(expected), rtol=0, atol=1e-6)


def test_a_plan_without_logits_has_no_entropy():
    plan = mk.plan_from_choices(torch.tensor([[0], [1]]), torch.ones(2, 1), 2)
    assert token_entropy(plan, 1, 2).isnan().all()


def test_wrong_plans_are_refused():
    with pytest.raises(ValueError, match="this model is dense"):
        check_plans([])
    plans = [mk.token_choice(torch.zeros(2, experts), 1) for experts in (2, 4)]
    with pytest.raises(ValueError, match=r"\[2, 4\] experts"):
        check_plans(plans)
    with pytest.raises(ValueError, match="2 tokens; expected at least 1 images of 3 tokens"):
        by_token(plans[0], 1, 3)
