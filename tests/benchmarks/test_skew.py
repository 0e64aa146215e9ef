"""Unequal use of the experts: as wanted, still random, and with one right answer."""

import pytest
import torch

from benchmarks.check import judge
from benchmarks.registry import ENTRIES
from benchmarks.stages import STAGES
from benchmarks.stages.common import MIN_GAP, gap, generator_on, normal
from benchmarks.stages.skew import SKEWS, load, shares, skewed_logits, skewed_tokens


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 6), (16, 1), (4, 4)])
@pytest.mark.parametrize("skew", SKEWS)
def test_shares(skew, experts, top_k):
    found = shares(skew, experts, top_k)
    assert found.sum() == pytest.approx(top_k)
    assert found.max() <= 1
    assert (found.diff() <= 0).all()
    if skew == "collapsed":
        assert int((found > 0).sum()) == top_k


def test_zipf_is_one_over_the_rank_as_far_as_a_token_takes_an_expert_once():
    found = shares("zipf", 8, 2)
    assert torch.allclose(found * torch.arange(1, 9), found[:1].expand(8))
    capped = shares("zipf", 64, 6)
    assert capped[0] == 1
    assert torch.allclose(capped[1:] * torch.arange(2, 65), 2 * capped[1:2].expand(63))


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 6)])
@pytest.mark.parametrize("skew", SKEWS[1:])
def test_logits_follow_the_shares(skew, experts, top_k):
    generator = generator_on()
    plain = normal(generator, 4096, experts)
    logits = skewed_logits(plain, skew, top_k, generator)
    assert torch.equal(logits.sort(1).values, plain.sort(1).values)
    chosen = logits.topk(top_k, dim=1).indices.flatten()
    found = torch.bincount(chosen, minlength=experts) / 4096
    # Four standard deviations of a share that is drawn 4096 times.
    assert torch.allclose(found.double(), shares(skew, experts, top_k), atol=4 * 0.5 / 64)
    # The best of a token's experts is not always the same one.
    assert len(logits.argmax(1).unique()) > 1


@pytest.mark.parametrize("skew", SKEWS[1:])
def test_tokens_have_the_skewed_logits_and_stay_random(skew):
    generator = generator_on()
    x, router = normal(generator, 512, 32), normal(generator, 8, 32, fan_in=32)
    moved = skewed_tokens(x, router, skew, 2, generator)
    logits = (x @ router.T).sort(1).values
    assert torch.allclose((moved @ router.T).sort(1).values, logits, atol=1e-4)
    assert 0.8 < float(moved.std()) < 1.3
    assert abs(float(moved.mean())) < 0.1


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_route_as_wanted_and_without_ties(skew, dtype):
    layer = {"B": 2, "S": 256, "D": 32, "E": 8, "skew": skew}
    inputs = STAGES["dit_moe_layer"].make_inputs(layer, dtype)
    x, router = inputs.leaves["x"].flatten(0, 1).double(), inputs.leaves["router"].double()
    affinity = (x @ router.T).softmax(-1)
    routed = STAGES["token_choice"].make_inputs({"T": 512, "E": 8, "K": 2, "skew": skew}, dtype)
    logits = routed.leaves["router_logits"].double().softmax(-1)
    low, high = {"uniform": (1.0, 1.4), "zipf": (2.6, 3.3), "collapsed": (3.9, 4.0)}[skew]
    for found, probs in ((inputs, affinity), (routed, logits)):
        assert low <= found.fixed["load"] <= high
        assert found.fixed["load"] == pytest.approx(load(probs, 2), rel=0.02)
        assert gap(probs, 2) >= MIN_GAP


def test_a_collapsed_layer_leaves_experts_empty_and_providers_agree():
    entry = next(e for e in ENTRIES if e.name.startswith("dit_moe_skew/collapsed"))
    stage = STAGES[entry.stage]
    inputs = stage.make_inputs(entry.tiny, entry.torch_dtype)
    names = ("published", "good_eager", "grouped_mm", "ours")
    runs = {name: stage.providers[name].build(inputs) for name in names}
    verdicts = judge(stage, inputs, dict(runs), entry.torch_dtype)
    assert {verdict.status for verdict in verdicts.values()} == {"ok"}
    (gradient,) = torch.autograd.grad(runs["ours"].call()[0].sum(), runs["ours"].leaves["w_in"])
    assert [bool(expert.any()) for expert in gradient] == [True] * 2 + [False] * 6


def test_uniform_is_the_entry_without_the_word():
    shape = {"B": 2, "S": 24, "D": 16, "E": 8}
    make = STAGES["dit_moe_layer"].make_inputs
    plain, uniform = (make(s, torch.float32) for s in (shape, {**shape, "skew": "uniform"}))
    for name, value in plain.leaves.items():
        assert torch.equal(value, uniform.leaves[name])
    assert "load" not in plain.fixed


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="skew is 'pareto'; expected one of uniform, zipf"):
        shares("pareto", 8, 2)
