"""Pictures: what is drawn of a document, where points and roofs lie, how providers look."""

import copy
import itertools
import re

import pytest

from benchmarks import output, plots
from benchmarks.plots import bars, canvas, colours, memory, ratios, roofline, series
from benchmarks.profiling.stages import BACKWARD, FUSED, PRODUCTS, SELECT
from benchmarks.stages import STAGES

MACHINE = {
    "cpu": "Intel(R) Xeon(R) Processor @ 2.10GHz",
    "threads": 2,
    "torch": "2.13.0",
    "device": {"gpu": "NVIDIA H100"},
}
KINDS = {"published": "plain", "good_eager": "plain", "dense_limit": "limit", "ours": "ours"}


def times(**medians):
    return {
        name: {"median": value, "low": 0.9 * value, "high": 1.2 * value}
        for name, value in medians.items()
    }


def entry(name, axis=None, scale=1.0, **more):
    found = {"published": 3e-3, "good_eager": 2e-3, "dense_limit": 5e-4, "ours": 1e-3}
    found = {provider: scale * seconds for provider, seconds in found.items()}
    mode = {
        "rounds": 5,
        "limit": 0.0,
        "times": times(**found),
        "ratios": times(published=3.0, good_eager=2.0, dense_limit=0.5),
        "cost": {"flops": 4e6, "bytes": 1e6},
    }
    return {
        "name": name,
        "stage": "dit_moe_layer",
        "providers": {provider: {"kind": kind} for provider, kind in KINDS.items()},
        "axis": axis,
        "modes": {"forward": mode, "both": copy.deepcopy(mode)},
        "memory": {
            "published": {"reason": "killed"},
            "ours": {"peak_bytes": 2**20 * scale, "saved_bytes": 2**19 * scale},
        },
        "slower": [],
        "goals": [],
        **more,
    }


def along(name, *values, **more):
    return [
        entry(f"{name}/{value}", {"name": "tokens", "value": value}, value / 100, **more)
        for value in values
    ]


@pytest.fixture
def document():
    shares = {SELECT: 1e-4, PRODUCTS: 5e-4, PRODUCTS + BACKWARD: 9e-4, FUSED: 1e-4}
    row = {"entry": "dit_moe_layer/D384-T2048", "provider": "ours", "mode": "both"}
    return {
        "environment": MACHINE,
        "settings": {},
        "entries": [
            entry("dit_moe_layer/D384-T2048"),
            *along("scaling_layer_tokens", 400, 100, 200),
            *along("scaling_memory_tokens", 100, 200, modes={}),
            entry("route/T4096", device="cuda"),
        ],
        "rates": {
            "product": {"float32": 1e11, "bfloat16": 4e11},
            "copy": 1e10,
            "product_tflops": 700.0,
            "copy_tb_s": 3.0,
        },
        "stages": [{**row, "seconds": sum(shares.values()), "stages": shares}],
        "models": [
            {
                "name": "DiT-MoE-S/2-8E2A",
                "batch_size": 8,
                "images_per_second": {"published": 1.5, "ours": 2.0},
            }
        ],
        "compile": [
            {"name": "layer", "provider": "ours", "first_seconds": 0.1, "steady_seconds": 1e-3},
            {"name": "layer", "provider": "compiled", "reason": "no compiler"},
        ],
    }


def test_every_part_of_a_document_is_drawn(tmp_path, document):
    paths = plots.draw(tmp_path / "new", document, prefix="here-")
    assert sorted(path.name for path in paths) == [
        "here-compile.png",
        "here-dit_moe_layer.png",
        "here-memory-cuda.png",
        "here-memory-scaling_layer_tokens.png",
        "here-memory-scaling_memory_tokens.png",
        "here-memory.png",
        "here-models.png",
        "here-roofline-cuda.png",
        "here-roofline.png",
        "here-route-cuda.png",
        "here-scaling_layer_tokens.png",
        "here-stages-dit_moe_layer-D384-T2048.png",
    ]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(
        path.name for path in paths
    )
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 2000 < len(data) < 120_000, path.name


@pytest.mark.parametrize(
    "nothing",
    [
        {},
        {"entries": []},
        {"entries": [entry("a/b", modes={}, memory={})], "models": [], "stages": []},
        {"compile": [{"name": "a", "provider": "compiled", "reason": "no compiler"}]},
    ],
)
def test_what_a_document_lacks_is_not_drawn(tmp_path, nothing):
    assert plots.draw(tmp_path, nothing) == []


def test_a_kept_document_of_the_first_kind_still_draws(tmp_path):
    document = output.read(output.RESULTS / "cpu-2-cores")
    combine = [found for found in document["entries"] if found["name"].startswith("combine/")][:2]
    for found in combine:
        found.pop("device", None)
        found.pop("axis", None)
        for mode in found["modes"].values():
            mode.pop("cost", None)
    old = {key: document[key] for key in ("environment", "settings", "complete", "slower")}
    (path,) = plots.draw(tmp_path, {**old, "entries": combine})
    assert path.name == "combine.png"


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"\[bench\]"):
        plots.draw(tmp_path, {})


@pytest.mark.parametrize(
    ("least", "most", "wanted"),
    [
        (0.93, 1.25, [1, 1.2]),
        (0.5, 1.4, [0.6, 0.8, 1, 1.2, 1.5]),
        (0.5, 12, [0.5, 1, 2, 5, 10]),
        (0.1, 90, [0.1, 1, 10]),
    ],
)
def test_a_scale_has_numbers_however_narrow_it_is(least, most, wanted):
    assert ratios._ticks(least, most) == pytest.approx(wanted)


def test_long_groups_are_spread_evenly_over_pictures():
    blocks = [
        bars.Block(str(n), {"forward": [bars.Bar(p, 1.0, "1x") for p in "abcdefg"]})
        for n in range(20)
    ]
    pages = bars.pages(blocks)
    assert [block for page in pages for block in page] == blocks
    lines = [round(bars.height_of(page) / bars.LINE) for page in pages]
    assert len(pages) == 3
    assert sum(lines) == 160
    assert max(lines) - min(lines) <= 8
    assert bars.pages(blocks[:3]) == [blocks[:3]]


def test_a_series_is_in_the_order_of_its_axis(document):
    found = series.series_of(document)
    assert list(found) == [("scaling_layer_tokens", "cpu"), ("scaling_memory_tokens", "cpu")]
    values = [result["axis"]["value"] for result in found["scaling_layer_tokens", "cpu"]]
    assert values == [100, 200, 400]
    assert len(series.outside_series(document)) == 2
    document["entries"] = along("scaling_layer_tokens", 100)
    assert series.series_of(document) == {}
    assert series.outside_series(document) == document["entries"]


def test_points_of_the_roofline(document):
    points = roofline.points_of(document, "cpu")
    assert list(points) == ["forward", "both"]
    first = points["forward"][0]
    assert first.intensity == pytest.approx(4.0)
    assert first.ours == pytest.approx(4e9)
    assert first.peer == pytest.approx(2e9)  # good_eager: the fastest that computes the same
    assert len(points["forward"]) == 4
    assert len(roofline.points_of(document, "cuda")["forward"]) == 1
    for result in document["entries"]:
        for mode in result["modes"].values():
            del mode["cost"]
    assert roofline.points_of(document, "cpu") == {}


def test_roofs_are_the_measured_ones_only(document):
    assert roofline.roofs_of(document, "cpu") == ({"float32": 1e11, "bfloat16": 4e11}, 1e10)
    assert roofline.roofs_of(document, "cuda") == ({"bfloat16": 7e14}, 3e12)
    of_settings = {"settings": {"product_tflops": 1.0, "copy_tb_s": 2.0}, "rates": {}}
    assert roofline.roofs_of(of_settings, "cuda") == ({"bfloat16": 1e12}, 2e12)
    assert roofline.roofs_of({}, "cpu") == ({}, None)


def test_memory_needs_a_measured_peak(document):
    assert memory._measured(document["entries"][0])
    assert not memory._measured({"memory": {"ours": {"reason": "killed"}}})
    assert not memory._measured({})


def test_the_machine_in_a_few_words(document):
    assert canvas.machine_of(document, "cpu") == "Intel Xeon @ 2.10GHz, 2 threads, PyTorch 2.13.0"
    assert canvas.machine_of(document, "cuda") == "NVIDIA H100, PyTorch 2.13.0"
    assert canvas.machine_of({}, "cpu") == "a CPU"
    assert canvas.machine_of({"environment": {"cpu": "Neoverse", "threads": 1}}, "cpu") == (
        "Neoverse, 1 thread"
    )


def test_providers_of_a_stage_look_different():
    for stage in STAGES.values():
        for one, other in itertools.combinations(stage.providers, 2):
            assert colours.style_of(one) != colours.style_of(other), (one, other)
    unknown = colours.style_of("somebody's")
    assert unknown == colours.style_of("somebody's")
    for style in (unknown, *colours.STYLES.values()):
        assert re.fullmatch("#[0-9A-F]{6}", style.colour)
    mine = {name for name, style in colours.STYLES.items() if style.colour == "#D55E00"}
    assert all(name.startswith("ours") for name in mine)
    assert colours.OURS in mine
