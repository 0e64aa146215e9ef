"""The GPU's entries through its runner, at tiny shapes on the CPU; figures, goals and texts."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import moe_kernels as mk
from benchmarks import output, run
from benchmarks.check import judge
from benchmarks.entry import BY_BACKEND, CPU, FigureGoal, Run
from benchmarks.gpu import figures, hardware, runner, summary, table
from benchmarks.libraries import EXPERTS, Experts
from benchmarks.registry import find_entry
from benchmarks.registry_gpu import GPU_ENTRIES
from benchmarks.report import markdown
from benchmarks.runner import Settings, failed
from benchmarks.stages import STAGES
from benchmarks.stages.common import MIN_GAP, gap, generator_on, normal, separated_tokens
from benchmarks.suites import SUITES
from moe_kernels.backends import BACKENDS

QUICK = Settings(repeats=5, seconds=0, compiled=False)
ON_CUDA_ONLY = {name for name, known in EXPERTS.items() if known.library.devices == ("cuda",)}
ON_CUDA_ONLY |= {"transformer_engine"}


def small(name: str) -> Any:
    return next(entry for entry in SUITES["gpu-smoke"] if entry.name == name)


def test_entries_are_complete():
    assert SUITES["gpu"] == GPU_ENTRIES
    names = [entry.name for suite in ("cpu", "gpu") for entry in SUITES[suite]]
    assert len(set(names)) == len(names)
    measured = figures_known()
    for entry in GPU_ENTRIES:
        assert find_entry(entry.name) is entry
        assert entry.providers[-1] == "ours"
        assert set(entry.providers) <= set(STAGES[entry.stage].providers)
        assert set(entry.memory) <= set(entry.providers)
        assert set(entry.tiny) == set(entry.shape)
        for goal in entry.goals:
            assert goal.against in entry.providers
            assert goal.mode in entry.modes
        for wanted in entry.figures:
            assert (wanted.at_least is None) != (wanted.at_most is None)
            mode, _, figure = wanted.figure.partition(".")
            assert wanted.figure.partition(".")[0] in entry.modes or mode in measured
            assert not figure or f"<mode>.{figure}" in measured or mode == "saved_share"


def figures_known() -> set[str]:
    """Names that the table in the module's docstring explains."""
    text = figures.__doc__ or ""
    lines = [line.split("``")[1] for line in text.splitlines() if line.startswith("``")]
    return {*lines, *(line.partition(".")[0] for line in lines)}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A part of every kind of entry, as from the command line."""
    folder = tmp_path_factory.mktemp("gpu") / "smoke"
    only = "gpu_ec_layer/B32|gpu_dit_moe_layer/T8192|S256-E8|token_choice/T8192-E8|T8192-D1152"
    arguments = ["--suite", "gpu-smoke", "--device", "cpu", "--only", only, "--no-compile"]
    status = run.main([*arguments, "--repeats", "5", "--seconds", "0", "--out", str(folder)])
    return status, folder, output.read(folder)


def test_every_provider_is_right_and_timed(smoke):
    status, folder, document = smoke
    assert status == 0
    stages = {result["stage"] for result in document["entries"]}
    assert stages == {entry.stage for entry in GPU_ENTRIES}
    for result in document["entries"]:
        for name, verdict in result["providers"].items():
            skipped = name in (*ON_CUDA_ONLY, *BY_BACKEND) or name.endswith("compiled")
            expected = {"skipped"} if skipped else {"ok", "limit"}
            assert verdict["status"] in expected, (result["name"], name, verdict)
        assert result["truth"] == "fp64"
        assert result["input_sets"] == runner.MAX_SETS
        for found in result["modes"].values():
            assert set(found["times"]) == set(found["host"])
            assert found["rounds"] == 5
            assert result["figures"]["forward.us"] > 0
    assert (folder / "gpu_ec_layer.png").exists()
    assert "in a graph" in (folder / "results.md").read_text()


def test_a_library_for_gpus_is_skipped_with_the_reason(smoke):
    verdicts = {
        name: verdict
        for result in smoke[2]["entries"]
        for name, verdict in result["providers"].items()
        if name in ON_CUDA_ONLY
    }
    assert set(verdicts) == ON_CUDA_ONLY
    for name, verdict in verdicts.items():
        assert verdict["reason"] == "Unavailable: needs a CUDA device, this is the CPU", name


@pytest.mark.parametrize("provider", BY_BACKEND)
@pytest.mark.parametrize("stage", ["expert_choice", "token_choice", "dispatch", "combine"])
def test_each_backend_by_itself_is_compared_and_never_timed_in_an_emulator(
    monkeypatch, stage, provider
):
    entry = next(
        entry
        for entry in SUITES["gpu-smoke"]
        if entry.stage == stage and provider in entry.providers
    )
    inputs = STAGES[stage].make_inputs(entry.shape, entry.torch_dtype)
    name = provider.removeprefix("ours:")
    known = BACKENDS[name]
    if "cpu" in known.on_request:
        with pytest.raises(mk.BackendUnavailable, match=f"{name} would only be emulated on cpu"):
            STAGES[stage].providers[provider].build(inputs)
    if (reason := known.why_not(stage, "cpu")) is not None:
        pytest.skip(f"the {name} backend {reason}")
    monkeypatch.setitem(BACKENDS, name, replace(known, device_types=("cpu",), on_request=()))
    runs: dict[str, Run | str] = {provider: STAGES[stage].providers[provider].build(inputs)}
    verdict = judge(STAGES[stage], inputs, runs, entry.torch_dtype)[provider]
    assert verdict.status == "ok", verdict.reason
    wrong = replace(runs[provider], call=lambda: tuple(o.flip(0) for o in runs[provider].call()))
    verdict = judge(STAGES[stage], inputs, {provider: wrong}, entry.torch_dtype)[provider]
    assert verdict.status == "wrong"


def test_a_backend_that_is_wrong_makes_the_run_fail_and_is_not_timed(monkeypatch):
    entry = small("gpu_dispatch/T8192-D1152")
    stage = STAGES[entry.stage]

    def build(inputs):
        good = stage.providers["ours"].build(inputs)
        return replace(good, call=lambda: tuple(out * 1.01 for out in good.call()))

    wrong = replace(stage.providers["ours:cuda"], build=build)
    providers = {**stage.providers, "ours:cuda": wrong}
    monkeypatch.setitem(STAGES, entry.stage, replace(stage, providers=providers))
    result = runner.run_entry(entry, runner.Bench.on(CPU, QUICK))
    assert result["providers"]["ours:cuda"]["status"] == "wrong"
    assert failed(result)
    assert "ours:cuda" not in result["modes"]["forward"]["times"]
    assert "ours" in result["modes"]["forward"]["times"]


def test_a_library_is_called_as_it_wants_and_compared(monkeypatch):
    """A stand-in with Liger's signature: rows in the order of tokens, weights in fp32."""

    def experts(x, weights, chosen, w_in, w_out):
        assert weights.dtype == torch.float32
        assert chosen.dtype == torch.int32
        out = torch.zeros_like(x)
        for k in range(chosen.shape[1]):
            into, back = w_in[chosen[:, k].long()], w_out[chosen[:, k].long()]
            gate, up = torch.einsum("tfd,td->tf", into, x).chunk(2, dim=-1)
            y = torch.einsum("tdf,tf->td", back, torch.nn.functional.silu(gate) * up)
            out = out + weights[:, k : k + 1].to(x.dtype) * y
        return out

    known = EXPERTS["liger"]
    here = replace(known.library, devices=("cpu",))
    stand_in = replace(known, library=here, experts=Experts(lambda: experts, "a stand-in"))
    monkeypatch.setitem(EXPERTS, "liger", stand_in)
    entry = small("gpu_dit_moe_layer/T8192-D1152-E8-K2")
    result = runner.run_entry(entry, runner.Bench.on(CPU, replace(QUICK, modes=("both",))))
    assert result["providers"]["liger"]["status"] == "ok", result["providers"]["liger"]
    assert "liger" in result["modes"]["both"]["ratios"]


def test_ours_that_is_wrong_is_not_timed(monkeypatch):
    entry = small("gpu_dispatch/T8192-D1152")
    stage = STAGES[entry.stage]

    def build(inputs):
        good = stage.providers["ours"].build(inputs)
        return replace(good, call=lambda: tuple(out.flip(0) for out in good.call()))

    wrong = replace(stage.providers["ours"], build=build)
    providers = {**stage.providers, "ours": wrong}
    monkeypatch.setitem(STAGES, entry.stage, replace(stage, providers=providers))
    result = runner.run_entry(entry, runner.Bench.on(CPU, QUICK))
    assert failed(result)
    assert result["modes"] == {}
    (row,) = [row for row in table.rows(result) if "skipped" not in row]
    assert "FAIL" in row
    assert "FAIL" in list(summary.lines([result]))[1]


def test_the_truth_falls_back_to_fp32(monkeypatch):
    entry = small("gpu_dispatch/T8192-D1152")
    real, seen = runner.truth, []

    def truth(stage, inputs, precision=torch.float64):
        seen.append(precision)
        if precision == torch.float64:
            raise torch.OutOfMemoryError("too large")
        return real(stage, inputs, precision)

    monkeypatch.setattr(runner, "truth", truth)
    result = runner.run_entry(entry, runner.Bench.on(CPU, QUICK))
    assert seen == [torch.float64, torch.float32]
    assert result["truth"] == "fp32"
    assert not failed(result)


def times(**medians):
    return {name: {"median": value, "low": value, "high": value} for name, value in medians.items()}


@pytest.fixture
def result():
    """A made-up result of the first DiT-MoE entry."""
    ok = {"status": "ok", "errors": {"out": 1e-3}, "reason": ""}
    return {
        "name": "gpu_dit_moe_layer/T8192-D1152-E8-K2",
        "stage": "dit_moe_layer",
        "shape": {"T": 8192},
        "dtype": "bfloat16",
        "providers": {
            "grouped_mm": {"kind": "plain", **ok},
            "dense_limit": {"kind": "limit", **ok, "status": "limit", "errors": {}},
            "liger": {"kind": "plain", "status": "skipped", "errors": {}, "reason": "not there"},
            "ours": {"kind": "ours", **ok},
        },
        "modes": {
            "both": {
                "rounds": 5,
                "limit": 2e-3,
                "times": times(grouped_mm=6e-3, dense_limit=3e-3, ours=4e-3),
                "ratios": times(grouped_mm=1.5, dense_limit=0.75),
                "host": times(grouped_mm=1e-3, dense_limit=1e-3, ours=5e-4),
                "graph": {"ours": times(a=3e-3)["a"], "grouped_mm": {"reason": "waits"}},
            }
        },
        "probes": {"ours": {"mode": "both", "host_syncs": 0, "kernels": 12, "copies": 1}},
        "memory": {
            "ours": {"peak_bytes": 2**21, "saved_bytes": 2**19, "gradient_bytes": 2**18},
            "good_eager": {"peak_bytes": 2**22, "saved_bytes": 2**20, "gradient_bytes": 2**18},
        },
        "goals": [],
        "slower": [],
    }


def weighed(result):
    entry = find_entry(result["name"])
    bench = runner.Bench.on(CPU, QUICK)
    result["figures"] = figures.figures_of(entry, STAGES[entry.stage], result, bench.limits)
    result["figure_goals"] = figures.weigh_figures(entry, result["figures"])
    return result


def test_figures_say_what_is_met_and_missed(result):
    found = weighed(result)["figures"]
    assert found["both.us"] == pytest.approx(4000)
    assert found["both.host_us"] == pytest.approx(500)
    assert found["both.graph_us"] == pytest.approx(3000)
    assert found["both.best"] == 1.5
    assert found["both.dense_share"] == pytest.approx(4 / 3)
    assert found["saved_share.good_eager"] == 0.5
    assert found["host_syncs"] == 0
    # 6 FLOPs for each weight of the experts that a token takes, and the router's.
    flops = 6 * 8192 * (2 * 3 * 1152 * 4608 + 8 * 1152)
    assert found["both.tflops"] == pytest.approx(flops / 4e-3 * 1e-12)
    goals = {goal["figure"]: goal["met"] for goal in result["figure_goals"]}
    assert goals == {
        "both.best": True,
        "both.tflops": False,
        "both.dense_share": False,
        "saved_share.good_eager": True,
        "host_syncs": True,
    }


def test_figure_goals_in_both_directions():
    assert FigureGoal("x", at_most=0).met(0)
    assert not FigureGoal("x", at_most=0).met(1)
    assert FigureGoal("x", at_least=0.7).met(0.7)
    assert FigureGoal("x", at_most=0).words() == "<= 0"


def test_texts_show_graphs_memory_and_goals(result):
    weighed(result)
    rows = [" | ".join(row) for row in table.rows(result)]
    assert any("liger | skipped" in row and "not there" in row for row in rows)
    assert any("3.00 ms" in row and "0 host syncs; 12 kernels, 1 copies" in row for row in rows)
    assert any("no graph: waits" in row for row in rows)
    assert any("0.5 MiB kept for backward" in row for row in rows)
    lines = list(summary.lines([result]))
    assert "grouped_mm 1.50x" in lines[1]
    assert "both.dense_share <= 1.15: 1.33 MISSED" in lines[1]
    assert summary.goals_met([result]) == (3, 5)
    document = {
        "environment": {"command": "x", "device": {"gpu": "a GPU"}},
        "settings": {},
        "complete": False,
        "entries": [result],
        "not_measured": [{"name": "gpu_x", "reason": "no time"}],
        "first_call": {"gpu_y": {"first_s": 12.0, "second_s": 0.1}},
    }
    text = markdown(document)
    assert "| both.tflops | >= 400 |" in text
    assert "| gpu_x | no time |" in text
    assert "- gpu_y on the GPU, with empty caches: first_s 12.0" in text


def test_cuda_is_refused_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main(["--suite", "gpu"])
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert run.choose_device("auto", "cpu") == CPU
    assert run.choose_device("auto", "gpu-smoke") == CPU


def test_hardware_is_read_from_nvidia_smi():
    assert hardware.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    names = {"driver": "driver_version", "sm_mhz": "x", "watts": "y"}
    found = hardware.parse("580.159.04, 1980, [N/A]\n", names)
    assert found == {"driver": "580.159.04", "sm_mhz": 1980.0}
    assert hardware.parse("580.10, 345, 71.5", names)["driver"] == "580.10"
    assert hardware.parse("No devices were found", names) == {}


@pytest.mark.parametrize("groups", [0, 4])
def test_narrow_boundaries_are_widened(groups):
    generator = generator_on()
    tokens = normal(generator, 64, 6)
    tokens[:, 1:] = tokens[:, :1]  # all equal: every boundary is as narrow as can be
    count = 2 if not groups else 5
    found = separated_tokens(
        tokens, lambda t: t.double().softmax(-1), count, generator, num_groups=groups
    )
    affinity = found.double().softmax(-1)
    if groups:
        affinity = affinity.view(groups, -1, 6).mT
    assert gap(affinity, count) >= MIN_GAP
    kept = normal(generator_on(), 64, 6)
    again = separated_tokens(kept, lambda t: t.double().softmax(-1), count, generator, groups)
    assert torch.equal(again, kept)
