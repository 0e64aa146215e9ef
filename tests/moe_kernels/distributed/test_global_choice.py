"""Choices from the tokens of all ranks equal those of one process, bit by bit."""

import itertools
import random

import pytest
import torch
from torch import distributed
from torch.distributed import group
from torch.utils.checkpoint import checkpoint

import moe_kernels as mk
from moe_kernels.distributed import (
    DistributedMismatch,
    debug_collectives,
    global_choice,
    global_expert_choice,
    global_kth_largest,
    global_pair_choice,
)
from tests.moe_kernels.distributed.global_pools import (
    KINDS,
    bits,
    draw_logits,
    rows_of,
    share_of,
)
from tests.ranks import run_outcomes, run_ranks

AFFINITIES = ("softmax", "sigmoid", "identity")


def cases(ranks, count, seed):
    """Sizes, logits and options of random pools; every rank draws the same."""
    draw = random.Random(seed)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        sizes = [draw.choice([0, 1, 3, 8, 8, 13]) for _ in range(ranks)]
        if not sum(sizes):
            sizes[-1] = 5
        dtype = draw.choice([torch.float32, torch.float64])
        experts = draw.choice([1, 2, 4, 7])
        yield draw, sizes, draw_logits(kind, sum(sizes), experts, dtype, seed + number)


def compare_expert_choices(count):
    ranks = distributed.get_world_size()
    for draw, sizes, logits in cases(ranks, count, 100 + ranks):
        where = share_of(sizes)
        tokens = sum(sizes)
        options = {
            "capacity": draw.choice([1, tokens, draw.randint(1, tokens)]),
            "affinity": draw.choice(AFFINITIES),
            "scale": draw.choice([1.0, 2.5]),
            "check_finite": False,
        }
        known = draw.choice([None, tokens])
        expected = mk.expert_choice(logits, **options)
        plan = global_expert_choice(
            logits[where], process_group=group.WORLD, num_tokens_global=known, **options
        )
        plan.validate()
        assert plan.router == "selection"
        assert bits(rows_of(plan, slice(0, plan.num_tokens))) == bits(rows_of(expected, where)), (
            sizes,
            options,
        )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_expert_choice_over_ranks_is_that_of_one_process(ranks):
    run_ranks(compare_expert_choices, ranks, 24)


def compare_pair_choices(count):
    ranks = distributed.get_world_size()
    for draw, sizes, logits in cases(ranks, count, 200 + ranks):
        where = share_of(sizes)
        num_rows = draw.choice([0, 1, logits.numel(), draw.randint(0, logits.numel())])
        options = {"affinity": draw.choice(AFFINITIES), "scale": 0.5, "check_finite": False}
        expected = mk.pair_choice(logits, num_rows, **options)
        plan = global_pair_choice(logits[where], num_rows, process_group=group.WORLD, **options)
        plan.validate()
        assert bits(rows_of(plan, slice(0, plan.num_tokens))) == bits(rows_of(expected, where))


@pytest.mark.parametrize("ranks", [2, 3])
def test_pair_choice_over_ranks_is_that_of_one_process(ranks):
    run_ranks(compare_pair_choices, ranks, 24)


def compare_kth_largest(count):
    ranks = distributed.get_world_size()
    for draw, sizes, values in cases(ranks, count, 300 + ranks):
        k = draw.randint(1, sum(sizes))
        expected = torch.where(values.isnan(), float("-inf"), values)
        expected = expected.sort(0, descending=True).values[k - 1]
        found = global_kth_largest(values[share_of(sizes)], k, process_group=group.WORLD)
        assert found.dtype == values.dtype
        assert torch.equal(found, expected)


def test_kth_largest_over_ranks():
    run_ranks(compare_kth_largest, 3, 24)


SIZES = [7, 0, 12]
EXPERTS = 6


def gradients():
    """Gradients of this rank's logits for random upstream gradients, and those of one process."""
    where, tokens, experts = share_of(SIZES), sum(SIZES), 5
    logits = draw_logits("normal", tokens, experts, torch.float64, 7)
    upstream = draw_logits("normal", tokens, experts, torch.float64, 8)
    results = []
    for affinity, normalize in itertools.product(["softmax", "sigmoid"], ["none", "per_token"]):
        options = {"affinity": affinity, "normalize": normalize, "scale": 1.5}
        whole = logits.clone().requires_grad_()
        plan = mk.expert_choice(whole, 2.0, **options)
        wanted = upstream[plan.token_indices.long(), plan.expert_of_row.long()]
        plan.routing_weights.backward(wanted)

        part = logits[where].clone().requires_grad_()
        plan = global_expert_choice(part, 2.0, process_group=group.WORLD, **options)
        wanted = upstream[where][plan.token_indices.long(), plan.expert_of_row.long()]
        plan.routing_weights.backward(wanted)
        results.append((part.grad, whole.grad[where], plan.num_rows))
    return results


def test_gradients_are_those_of_one_process():
    ranks = run_ranks(gradients, 3)
    for results in zip(*ranks, strict=True):
        for found, expected, _ in results:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
        assert sum(num_rows for _, _, num_rows in results) == 5 * (sum(SIZES) * 2 // 5)


class Collectives:
    """Counts collectives and what each rank hands over, in bytes."""

    def __enter__(self):
        self.bytes = {"all_reduce": 0, "all_gather": 0}
        self.calls = dict.fromkeys(self.bytes, 0)
        self._real = {name: getattr(distributed, name) for name in self.bytes}
        for name in self.bytes:
            setattr(distributed, name, self._counting(name))
        return self

    def _counting(self, name):
        def count(*tensors, **options):
            self.calls[name] += 1
            self.bytes[name] += tensors[-1].nbytes  # what is sent
            return self._real[name](*tensors, **options)

        return count

    def __exit__(self, *_):
        for name, real in self._real.items():
            setattr(distributed, name, real)


def count_messages(dtype):
    """Calls and bytes for few tokens and many, and for a number of tokens that is not known."""
    ranks = distributed.get_world_size()
    results = []
    for tokens, known in ((32, True), (2048, True), (32, False)):
        logits = draw_logits("normal", tokens, EXPERTS, dtype, distributed.get_rank())
        total = tokens * ranks if known else None
        with Collectives() as seen:
            global_expert_choice(logits, 2.0, process_group=group.WORLD, num_tokens_global=total)
        results.append((seen.calls, seen.bytes))
    return results


@pytest.mark.parametrize(("dtype", "passes"), [(torch.float32, 4), (torch.float64, 8)])
def test_messages_are_histograms_however_many_tokens_there_are(dtype, passes):
    histograms = passes * EXPERTS * 256 * 4
    # and tokens, those that were promised, and values that are not finite
    ties = (EXPERTS + 3) * 4
    for few, many, uncounted in run_ranks(count_messages, 2, dtype):
        assert few[0] == {"all_reduce": passes, "all_gather": 1}
        assert few[1] == {"all_reduce": histograms, "all_gather": ties}
        assert many == few
        assert uncounted[0] == {"all_reduce": passes + 1, "all_gather": 1}
        assert uncounted[1]["all_reduce"] == histograms + 8


def recompute():
    """A layer under activation checkpointing: collectives of forward and backward, gradients."""
    torch.manual_seed(3)
    x = torch.randn(2, 2 * 9, 16, dtype=torch.float64)[:, 9 * distributed.get_rank() :][:, :9]
    router = mk.LinearRouter(16, 4, dtype=torch.float64)
    experts = mk.GroupedExperts(16, 8, 4, dtype=torch.float64)
    upstream = torch.randn(18, 16, dtype=torch.float64)

    def layer(x):
        plan = global_expert_choice(router.logits(x), 1.5, process_group=group.WORLD)
        return experts(x.flatten(0, 1), plan)

    results = []
    for run in (
        layer,
        lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=mk.save_routing_context_fn),
    ):
        leaf = x.clone().requires_grad_()
        with Collectives() as forward:
            out = run(leaf)
        with Collectives() as backward:
            out.backward(upstream)
        results.append((out.detach(), leaf.grad, router.weight.grad.clone()))
        router.weight.grad = None
    return forward.calls, backward.calls, results


def test_a_recomputed_forward_neither_talks_nor_chooses_again():
    for forward, backward, (plain, recomputed) in run_ranks(recompute, 2):
        assert forward == {"all_reduce": 9, "all_gather": 1}
        assert backward == {"all_reduce": 0, "all_gather": 0}
        for expected, found in zip(plain, recomputed, strict=True):
            assert torch.equal(expected, found)


def wrong_calls():
    """What each rank says to wrong input; all ranks must raise, or the group would hang."""
    rank = distributed.get_rank()
    logits = draw_logits("normal", 8, 4, torch.float32, rank)
    broken = logits.clone()
    if rank == 1:
        broken[3, 2] = float("nan")
    attempts = [
        (global_expert_choice, broken, {}),
        (global_expert_choice, logits, {"num_tokens_global": 16 + rank}),
        (global_expert_choice, logits, {"capacity": 17}),
        (global_expert_choice, logits, {"capacity": 2, "capacity_factor": 2.0}),
        (global_expert_choice, logits, {"affinity": "identity", "normalize": "per_token"}),
        (global_pair_choice, logits, {"num_rows": 65}),
        (global_pair_choice, logits, {"num_rows": -1}),
        (global_kth_largest, logits, {"k": 0}),
    ]
    said = []
    for choose, values, options in attempts:
        with pytest.raises(ValueError, match=r"expected|give|use") as error:
            choose(values, process_group=group.WORLD, **options)
        said.append(str(error.value))
    with pytest.raises(ValueError, match="process_group is None"):
        global_expert_choice(logits, process_group=None)
    global_choice._MOST_PAIRS = 63
    with pytest.raises(ValueError, match="the ranks have 64 pairs; expected at most 63"):
        global_pair_choice(logits, 3, process_group=group.WORLD)
    return said


def test_wrong_calls_raise_on_every_rank():
    first, second = run_ranks(wrong_calls, 2)
    assert "1 non-finite values on all ranks, 0 of them on rank 0" in first[0]
    assert "1 of them on rank 1" in second[0]
    assert "num_tokens_global is 17, but the ranks have 16 tokens, 8 to 8 each" in first[1]
    assert first[1:] == second[1:]
    assert "the 16 tokens" in first[2]
    assert "the 64 pairs" in first[5]


def started_again():
    """A group of the same name as one that has ended."""
    logits = draw_logits("normal", 8, 4, torch.float32, 0)
    before = global_kth_largest(logits, 3, process_group=group.WORLD)
    distributed.destroy_process_group()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    assert torch.equal(global_kth_largest(logits, 3, process_group=group.WORLD), before)


def test_a_group_of_a_name_that_was_used_before():
    run_ranks(started_again, 1)


def other_experts():
    experts = 4 + distributed.get_rank()
    with debug_collectives():
        logits = draw_logits("normal", 8, experts, torch.float32, 0)
        global_expert_choice(logits, 1.0, process_group=group.WORLD)


def test_debug_mode_finds_ranks_that_differ():
    for outcome in run_outcomes(other_experts, 2):
        assert DistributedMismatch.__name__ in outcome.error
        assert "width" in outcome.error
