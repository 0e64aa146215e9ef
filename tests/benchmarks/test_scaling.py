"""Fitted exponents, and the entries that make up the series."""

from itertools import groupby

import pytest
import torch

from benchmarks.registry import ENTRIES, find_entry
from benchmarks.registry_gpu import GPU_ENTRIES
from benchmarks.registry_presets import layer_shape
from benchmarks.registry_scaling import GPU_SERIES, SERIES
from benchmarks.scaling import exponents, slope
from benchmarks.stages import STAGES
from benchmarks.table import group_of
from dit_models.presets import PRESETS


def result(series, size, seconds, mode="both"):
    times = {name: {"median": value} for name, value in seconds.items()}
    return {
        "name": f"{series}/{size}",
        "axis": {"name": "tokens", "value": size},
        "modes": {mode: {"times": times}},
    }


def test_power_laws_are_found():
    results = [
        result("scaling_a", size, {"ours": 3e-6 * size**1.5, "plain": 2e-9 * size**2})
        for size in (128, 256, 1024, 8192)
    ]
    ours, plain = exponents([*results, {"name": "other/x", "axis": None, "modes": {}}])
    assert ours.pop("exponent") == pytest.approx(1.5)
    assert plain.pop("exponent") == pytest.approx(2.0)
    same = {"series": "scaling_a", "axis": "tokens", "mode": "both", "points": 4}
    assert ours == {**same, "provider": "ours"}
    assert plain == {**same, "provider": "plain"}


def test_the_fit_is_a_least_squares_line_through_the_logarithms():
    sizes, seconds = [1.0, 2.0, 4.0, 8.0], [1.0, 2.5, 3.5, 8.5]
    x, y = torch.tensor(sizes).log(), torch.tensor(seconds).log()
    columns = torch.stack([x, torch.ones(4)], dim=1)
    wanted = torch.linalg.lstsq(columns, y.unsqueeze(1)).solution[0, 0]
    assert slope(sizes, seconds) == pytest.approx(float(wanted), rel=1e-4)


def test_fewer_than_three_points_have_no_exponent():
    results = [result("a", size, {"ours": size}) for size in (1, 2, 4)]
    del results[0]["modes"]["both"]["times"]["ours"]
    results[0]["modes"]["both"]["times"]["late"] = {"median": 1.0}
    assert exponents(results) == []
    assert exponents([{"name": "old/x", "modes": {}}]) == []


def test_modes_and_series_are_kept_apart():
    results = [
        result(series, size, {"ours": size**power}, mode)
        for series, power in (("a", 1), ("b", 2))
        for mode in ("forward", "both")
        for size in (2, 4, 8)
    ]
    found = {(row["series"], row["mode"]): row["exponent"] for row in exponents(results)}
    assert found == pytest.approx(
        {("a", "forward"): 1, ("a", "both"): 1, ("b", "forward"): 2, ("b", "both"): 2}
    )


@pytest.mark.parametrize("entries", [ENTRIES, GPU_ENTRIES], ids=["cpu", "gpu"])
def test_a_series_differs_in_its_axis_alone(entries):
    in_series = [entry for entry in entries if entry.axis]
    assert len(in_series) > 30
    for group, members in groupby(in_series, lambda entry: group_of({"name": entry.name})):
        points = list(members)
        assert len(points) >= 3, group
        values = [point.axis.value for point in points]
        assert values == sorted(set(values)), group
        assert group.endswith(points[0].axis.name)
        (varied,) = (
            key for key in points[0].shape if len({point.shape[key] for point in points}) > 1
        )
        assert values == [point.shape[varied] for point in points]
        for point in points:
            assert find_entry(point.name) is point
            assert (point.stage, point.providers) == (points[0].stage, points[0].providers)
            assert point.modes or point.memory


def test_there_is_a_series_for_everything_that_grows():
    for series, layer in ((SERIES, "ec_layer"), (GPU_SERIES, "ec_layer")):
        axes = {one.axis for one in series if one.stage == layer}
        assert axes >= {"images", "experts", "capacity", "width"}
    for series in (SERIES, GPU_SERIES):
        axes = {one.axis for one in series if one.stage == "dit_moe_layer"}
        assert axes >= {"tokens", "experts", "capacity", "width"}


@pytest.mark.parametrize("stage", ["ec_layer", "dit_moe_layer"])
def test_more_experts_and_the_same_activated_arithmetic(stage):
    cost = STAGES[stage].cost
    points = [e for e in ENTRIES if e.name.startswith(f"scaling_{stage}_experts/")]
    flops = [cost(point.shape, 4, "forward").flops for point in points]
    routers = [2 * p.shape["B"] * p.shape["S"] * p.shape["D"] * p.shape["E"] for p in points]
    rest = {value - router for value, router in zip(flops, routers, strict=True)}
    assert len(rest) == 1


@pytest.mark.parametrize(
    ("stage", "key", "low", "high"),
    [("ec_layer", "capacity_factor", 1, 3), ("dit_moe_layer", "K", 1, 3)],
)
def test_capacity_is_what_providers_compute(stage, key, low, high):
    """Ours and the dense MLP grow with it as the cost does."""
    from benchmarks.op_counts import count

    shape = {"B": 2, "S": 24, "D": 16, "E": 8}
    made = {}
    for value in (low, high):
        inputs = STAGES[stage].make_inputs({**shape, key: value}, torch.float32)
        out = STAGES[stage].providers["ours"].build(inputs).call()[0].detach()
        exact = STAGES[stage].expected(inputs)["out"]
        assert torch.allclose(out, exact, atol=1e-4)
        dense = STAGES[stage].providers["dense_limit"].build(inputs)
        assert count(dense.call)["ops"] > 0
        made[value] = dense.leaves["w_in"][0].numel()
    shared = 2 if stage == "dit_moe_layer" else 0
    assert made[high] / made[low] == pytest.approx((4 * high + shared) / (4 * low + shared))


def test_layers_of_models_have_the_presets_sizes():
    stage, shape = layer_shape(PRESETS["DiT-MoE-G/2-16E2A"], 32)
    assert stage == "dit_moe_layer"
    assert shape == {"B": 32, "S": 256, "D": 1408, "E": 16, "width": 4, "K": 2, "shared": 2}
    stage, shape = layer_shape(PRESETS["EC-DiT-M-64E"], 1)
    assert stage == "ec_layer"
    assert shape == {"B": 1, "S": 256, "D": 3072, "E": 64, "width": 4, "capacity_factor": 2.0}
    for entry in (*ENTRIES, *GPU_ENTRIES):
        if "model_layer/" in entry.name:
            preset = entry.name.partition("/")[2].removesuffix("-bf16")
            config = PRESETS[preset]
            assert entry.shape["D"] == config.hidden_size
            assert entry.shape["E"] == config.num_experts
            assert entry.shape.get("capacity_factor", 0.0) == config.capacity_factor


def test_a_dense_model_has_no_layer():
    with pytest.raises(ValueError, match="num_experts is 0"):
        layer_shape(PRESETS["DiT-S/2"], 1)
