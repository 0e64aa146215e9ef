"""Every entry of every suite through the real command, at tiny shapes."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import output, run
from benchmarks.check import judge
from benchmarks.environment import ROOT, served_by
from benchmarks.registry import ENTRIES
from benchmarks.runner import Settings, failed, run_entry
from benchmarks.stages import STAGES
from benchmarks.suites import SUITES
from moe_kernels.backends import OPS

QUICK = ("--repeats", "5", "--seconds", "0", "--no-plots")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run of the smoke suite, as from the command line."""
    folder = tmp_path_factory.mktemp("benchmarks") / "smoke"
    threads = torch.get_num_threads()
    arguments = ["--suite", "smoke", *QUICK, "--no-compile", "--threads", "1"]
    status = run.main([*arguments, "--out", str(folder)])
    torch.set_num_threads(threads)
    return status, folder, output.read(folder)


def test_every_entry_runs_and_is_correct(smoke):
    status, _, document = smoke
    assert status == 0
    assert document["complete"]
    assert [result["name"] for result in document["entries"]] == [e.name for e in ENTRIES]
    for result in document["entries"]:
        verdicts = {name: found["status"] for name, found in result["providers"].items()}
        assert verdicts.pop("compiled", "skipped") == "skipped"
        assert set(verdicts.values()) <= {"ok", "limit"}, (result["name"], result["providers"])


def test_every_mode_of_every_provider_is_timed(smoke):
    for entry, result in zip(ENTRIES, smoke[2]["entries"], strict=True):
        assert tuple(result["modes"]) == entry.modes
        for mode, found in result["modes"].items():
            expected = set(entry.providers) - {"compiled"}
            if mode != "forward":
                expected -= {"minimal"}
            assert set(found["times"]) == expected
            assert set(found["ratios"]) == expected - {"ours"}
            assert found["rounds"] >= 5
            assert all(time["median"] > 0 for time in found["times"].values())


def test_the_header_says_what_ran(smoke):
    header = smoke[2]["environment"]
    assert set(header["served_by"]) == set(OPS)
    assert header["served_by"]["combine"] == served_by("combine")
    assert header["torch"] == torch.__version__
    assert header["threads"] == 1
    assert "--suite smoke" in header["command"]
    assert {"cpu", "cores", "isa", "blas", "commit", "dirty", "date"} <= set(header)


def test_the_report_is_beside_the_results(smoke):
    text = (smoke[1] / "results.md").read_text()
    for entry in ENTRIES:
        if entry.modes:  # at a tiny shape memory is not measured
            assert entry.name in text


def test_compiled_providers_run(tmp_path, monkeypatch):
    # Traced and differentiated as always, but no C++ is generated: that takes half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    names = "token_choice/T256|expert_choice/B8-S256-E8|ec_layer/D128"
    arguments = ["--suite", "smoke", "--only", names, "--modes", "both", *QUICK]
    assert run.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    results = output.read(tmp_path / "out")["entries"]
    assert len(results) == 3
    for result in results:
        assert result["providers"]["compiled"]["status"] == "ok", result["providers"]


def test_entries_are_complete():
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    for entry in ENTRIES:
        assert entry.providers[-1] == "ours"
        assert set(entry.providers) <= set(STAGES[entry.stage].providers)
        assert set(entry.memory) <= set(entry.providers)
        assert set(entry.tiny) == set(entry.shape)
        for goal in entry.goals:
            assert goal.against in entry.providers
            assert (goal.at_least is None) != (goal.at_most is None)
            assert goal.mode in (*entry.modes, "memory", "saved")


def small(name):
    return next(entry for entry in SUITES["smoke"] if entry.name == name)


def with_ours(stage, **changes):
    ours = stage.providers["ours"]
    return replace(stage, providers={**stage.providers, "ours": replace(ours, **changes)})


def spoiled(build, index, wrong):
    def build_wrong(inputs):
        good = build(inputs)

        def call():
            outputs = list(good.call())
            outputs[index] = wrong(outputs[index])
            return tuple(outputs)

        return replace(good, call=call)

    return build_wrong


@pytest.mark.parametrize(
    ("index", "wrong"),
    [
        (0, lambda weights: weights * 1.001),
        (0, lambda weights: weights.detach() + 1.001 * (weights - weights.detach())),
        (0, lambda weights: torch.where(weights > 2, weights, torch.nan)),
        (3, lambda tokens: tokens.flip(0)),
        (6, lambda rows: rows[:-1]),
    ],
    ids=["output", "gradient", "nan", "integers", "shape"],
)
def test_a_wrong_provider_is_never_timed(monkeypatch, index, wrong):
    entry = small("token_choice/T256-E8-K2")
    stage = STAGES[entry.stage]
    build = spoiled(stage.providers["ours"].build, index, wrong)
    monkeypatch.setitem(STAGES, entry.stage, with_ours(stage, build=build))
    result = run_entry(entry, Settings(repeats=5, seconds=0, compiled=False))
    assert failed(result)
    assert result["modes"] == {}
    assert result["providers"]["ours"]["reason"]
    json.dumps(result, allow_nan=False)


def test_a_wrong_peer_is_named_and_left_out(monkeypatch):
    entry = small("token_choice/T256-E8-K2")
    stage = STAGES[entry.stage]
    build = spoiled(stage.providers["eager"].build, 0, lambda weights: weights * 1.001)
    eager = replace(stage.providers["eager"], build=build)
    monkeypatch.setitem(
        STAGES, entry.stage, replace(stage, providers={**stage.providers, "eager": eager})
    )
    result = run_entry(entry, Settings(repeats=5, seconds=0, compiled=False))
    assert not failed(result)
    assert result["providers"]["eager"]["status"] == "wrong"
    assert "eager" not in result["modes"]["forward"]["times"]


def test_a_peer_that_cannot_run_is_skipped_and_ours_that_cannot_fails():
    entry = small("dispatch/T2048-D384")
    stage = STAGES[entry.stage]
    inputs = stage.make_inputs(entry.shape, entry.torch_dtype)
    reasons = dict.fromkeys(entry.providers, "no such instruction")
    verdicts = judge(stage, inputs, reasons, entry.torch_dtype)
    assert verdicts["index_select"].status == "skipped"
    assert verdicts["ours"].status == "wrong"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_command():
    command = [sys.executable, "-m", "benchmarks.memory", "ec_layer/D384-T128", "ours"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    weights = 8 * (2 * 4 * 384 * 384 + 5 * 384) * 4
    rest = 8 * 384 * 4 + 128 * 384 * 4  # router and tokens
    assert found["gradient_bytes"] == weights + rest
    assert found["peak_bytes"] > found["gradient_bytes"]
    assert 0 < found["saved_bytes"] < found["peak_bytes"]
