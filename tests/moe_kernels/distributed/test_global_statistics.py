"""Losses and statistics of all ranks' tokens against those of one process."""

import pytest
import torch
from torch import distributed
from torch.distributed import group

import moe_kernels as mk
from moe_kernels.distributed import (
    global_counts,
    global_load_balance_loss,
    global_router_similarity_loss,
    global_router_z_loss,
    global_routing_stats,
    global_tokens_per_expert,
    sum_over_ranks,
)
from tests.moe_kernels.distributed.global_pools import draw_logits, share_of
from tests.ranks import run_ranks

EXPERTS = 5
LAYERS = 2
LOSSES = {
    "balance": (global_load_balance_loss, mk.load_balance_loss),
    "z": (global_router_z_loss, mk.router_z_loss),
    "similarity": (global_router_similarity_loss, mk.router_similarity_loss),
}
ROUTERS = {
    "token_choice": lambda logits, affinity: mk.token_choice(logits, 2, affinity=affinity),
    "single": lambda logits, affinity: mk.token_choice(logits, 1, affinity=affinity),
    "selection": lambda logits, affinity: mk.plan_from_selection(
        logits > 0.3, logits, affinity=affinity
    ),
}


def route(router, affinity, tokens):
    """The plans of all tokens, whose choices do not depend on other tokens, and their logits."""
    logits = [draw_logits("normal", tokens, EXPERTS, torch.float64, 10 + i) for i in range(LAYERS)]
    leaves = [each.requires_grad_() for each in logits]
    return [ROUTERS[router](each, affinity) for each in leaves], leaves


def compare_losses(sizes):
    """Worst error of the losses' means over ranks and of the gradients, for each case."""
    where, ranks = share_of(sizes), len(sizes)
    generator = torch.Generator().manual_seed(0)
    errors = {}
    for router in ROUTERS:
        for affinity in ("softmax", "sigmoid"):
            for name, (over_ranks, alone) in LOSSES.items():
                upstream = torch.randn(LAYERS, generator=generator, dtype=torch.float64)
                plans, whole = route(router, affinity, sum(sizes))
                expected = torch.stack([alone(plan) for plan in plans])
                (expected * upstream).sum().backward()

                parts = [each.detach()[where].clone().requires_grad_() for each in whole]
                plans = [ROUTERS[router](each, affinity) for each in parts]
                found = torch.stack(over_ranks(plans, group.WORLD))
                (found * upstream).sum().backward()
                mean = sum_over_ranks([found], group.WORLD)[0] / ranks
                worst = relative(mean, expected.detach())
                for part, leaf in zip(parts, whole, strict=True):
                    if len(part):
                        worst = max(worst, relative(part.grad / ranks, leaf.grad[where]))
                errors[router, affinity, name] = worst
    return errors


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("sizes", [[9, 9], [4, 13, 0, 8]])
def test_the_mean_of_the_losses_is_that_of_all_tokens(sizes):
    for errors in run_ranks(compare_losses, len(sizes), sizes):
        assert len(errors) == 18
        assert max(errors.values()) < 1e-12, errors


def count_reduces(sizes):
    """Statistics and counts of this rank's tokens and of all, and the messages of each."""
    where = share_of(sizes)
    plans, leaves = route("selection", "softmax", sum(sizes))
    parts = [ROUTERS["selection"](each.detach()[where], "softmax") for each in leaves]
    calls = []
    real = distributed.all_reduce
    distributed.all_reduce = lambda *values, **options: (
        calls.append(values[0].numel()),
        real(*values, **options),
    )
    try:
        stats = global_routing_stats(parts, group.WORLD)
        rows = global_tokens_per_expert(parts, group.WORLD)
        counts = global_counts(parts, group.WORLD, chosen_together=True)
        for loss, _ in LOSSES.values():
            loss(parts, group.WORLD, counts=counts)
    finally:
        distributed.all_reduce = real
    expected = [mk.routing_stats(plan) for plan in plans]
    return calls, stats, rows, counts, expected, [plan.tokens_per_expert for plan in plans]


def test_statistics_are_those_of_all_tokens_in_one_message_for_all_layers():
    sizes = [3, 0, 14]
    for calls, stats, rows, counts, expected, expected_rows in run_ranks(count_reduces, 3, sizes):
        per_layer = EXPERTS + EXPERTS + 1 + (EXPERTS + 1)
        counted = LAYERS * (1 + EXPERTS + EXPERTS * EXPERTS)
        assert calls == [LAYERS * per_layer, LAYERS * EXPERTS, counted]
        assert counts.num_tokens.tolist() == [17] * LAYERS
        for layer in range(LAYERS):
            assert rows[layer].tolist() == expected_rows[layer].tolist()
            assert counts.tokens_per_expert[layer].tolist() == expected_rows[layer].tolist()
            together = counts.chosen_together[layer]
            assert together.diagonal().tolist() == expected_rows[layer].tolist()
            for name, value in expected[layer]._asdict().items():
                found = getattr(stats[layer], name)
                torch.testing.assert_close(
                    found, value, rtol=1e-7, atol=0, check_dtype=False, msg=name
                )


def accumulate(sizes):
    """Balance of two micro-batches of every rank, with counts of the whole step."""
    where, half = share_of(sizes), sizes[0] // 2
    plans, leaves = route("token_choice", "softmax", sum(sizes))
    expected = mk.load_balance_loss(plans[0])
    part = leaves[0].detach()[where]
    halves = [ROUTERS["token_choice"](each, "softmax") for each in (part[:half], part[half:])]
    counts = [
        a + b
        for a, b in zip(
            global_tokens_per_expert(halves[:1], group.WORLD),
            global_tokens_per_expert(halves[1:], group.WORLD),
            strict=True,
        )
    ]
    found = sum(
        global_load_balance_loss([plan], group.WORLD, tokens_per_expert=counts)[0] / 2
        for plan in halves
    )
    return float(sum_over_ranks([found], group.WORLD)[0] / len(sizes)), float(expected)


def test_balance_of_micro_batches_with_counts_of_the_step():
    for found, expected in run_ranks(accumulate, 2, [8, 8]):
        assert found == pytest.approx(expected, rel=1e-12)


def wrong_calls():
    plans, _ = route("token_choice", "softmax", 4)
    with pytest.raises(ValueError, match="plans is empty"):
        global_counts([], group.WORLD)
    counts = global_counts(plans, group.WORLD)
    with pytest.raises(ValueError, match="chosen_together of 0 layers; expected 2"):
        global_router_similarity_loss(plans, group.WORLD, counts=counts)
    with pytest.raises(ValueError, match="expected one dtype"):
        sum_over_ranks([torch.ones(1), torch.ones(1).double()], group.WORLD)
    assert global_tokens_per_expert([], group.WORLD) == []


def test_wrong_calls_say_what_to_do():
    run_ranks(wrong_calls, 1)
