"""Medians, ratios of rounds, and how long a measurement goes on, on made-up data."""

import gc

import pytest

from benchmarks import timing
from benchmarks.entry import Goal
from benchmarks.ratios import Summary, quantile, ratios, slower, summarize


def test_quantiles_interpolate():
    values = [4.0, 1.0, 3.0, 2.0]
    assert quantile(values, 0.5) == 2.5
    assert quantile(values, 0.0) == 1.0
    assert quantile(values, 1.0) == 4.0
    assert quantile(values, 0.25) == 1.75
    assert quantile([7.0], 0.75) == 7.0


def test_ratios_are_taken_inside_the_rounds():
    # The machine is ten times slower in the third round: no ratio notices.
    samples = {"ours": [1.0, 1.0, 10.0, 1.0, 1.0], "eager": [2.0, 2.0, 20.0, 2.0, 2.5]}
    assert ratios(samples) == {"eager": Summary(2.0, 2.0, 2.0)}
    assert summarize(samples["ours"]).median == 1.0


def test_ratios_need_the_same_rounds():
    with pytest.raises(ValueError, match="zip"):
        ratios({"ours": [1.0], "eager": [1.0, 2.0]})


def test_slower_lists_plain_alternatives_beyond_the_margin():
    found = {
        name: Summary(value, value, value)
        for name, value in {"a": 0.96, "b": 0.975, "c": 2.0, "dense_limit": 0.5}.items()
    }
    assert slower(found, plain=["a", "b", "c"]) == {"a": 0.96}


def test_goals_in_both_directions():
    assert Goal("both", "x", at_least=2.0).met(2.0)
    assert not Goal("both", "x", at_least=2.0).met(1.99)
    assert Goal("both", "x", at_most=0.5).met(2.0)
    assert not Goal("both", "x", at_most=0.5).met(1.9)
    assert Goal("both", "x", at_most=1.03).met(0.98)


def recorder(order, name, seconds):
    def sample(inner):
        order.append(name)
        return seconds * inner

    return sample


def test_rounds_sample_everybody_once_in_a_changing_order():
    order: list[str] = []
    samplers = {name: recorder(order, name, 1.0) for name in "abc"}
    samples = timing.measure(samplers, repeats=6, seconds=1e9)
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", 6)
    rounds = [order[-18:][i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1


def test_at_least_five_rounds_whatever_the_time():
    samples = timing.measure({"ours": recorder([], "ours", 1.0)}, repeats=1, seconds=0)
    assert len(samples["ours"]) == 5


def test_short_calls_are_repeated_inside_a_sample():
    inner: list[int] = []

    def sample(count):
        inner.append(count)
        return count * 1e-5

    samples = timing.measure({"ours": sample}, repeats=5, seconds=0)
    assert inner[-1] == 50  # half a millisecond
    assert samples["ours"] == pytest.approx([1e-5] * 5)


def test_the_collector_is_off_while_timing_and_on_again_after_an_error():
    seen: list[bool] = []

    def sample(inner):
        seen.append(gc.isenabled())
        raise KeyError

    with pytest.raises(KeyError):
        timing.measure({"ours": sample}, repeats=5, seconds=0)
    assert seen == [False]
    assert gc.isenabled()
