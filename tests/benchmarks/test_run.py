"""The command: suites, time, memory, interruption, what is missing, and what it writes."""

import contextlib
import csv
import json
import signal
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import csv_table, estimate, limits, output, parts, run, session, suites
from benchmarks.budget import FINISH_SECONDS, Budget, OutOfTime, at_most
from benchmarks.entry import CPU, Entry
from benchmarks.environment import ROOT
from benchmarks.gpu import first_steps, half, supervise, worker
from benchmarks.gpu import time_limit as limit_module
from benchmarks.gpu.jobs import Outcome
from benchmarks.gpu.time_limit import time_limit
from benchmarks.parts import Part
from benchmarks.registry import ENTRIES
from benchmarks.runner import Settings
from benchmarks.suites import STEPS, SUITES

MEASURED_RATES = limits.rates
RATES = {"product": {"float32": 1e11, "bfloat16": 1e11}, "copy": 1e10}
QUICK = ("--repeats", "5", "--seconds", "0", "--no-plots", "--no-compile")
TINY = ("--suite", "smoke", "--modes", "forward", *QUICK)


@pytest.fixture(autouse=True)
def no_large_products(monkeypatch):
    """The rates of the machine take half a gigabyte and seconds."""
    monkeypatch.setattr(limits, "rates", lambda: RATES)


class Time:
    """A clock that only moves when it is told to."""

    now = 0.0

    def __call__(self):
        return self.now


def test_suites_hold_what_their_names_say():
    assert SUITES["cpu"] == ENTRIES
    assert {entry.stage for entry in SUITES["router"]} == {"token_choice", "expert_choice"}
    assert {entry.stage for entry in SUITES["layer"]} == {"dit_moe_layer", "ec_layer"}
    assert all(entry.memory and not entry.modes for entry in SUITES["memory"])
    assert all(entry.axis and entry.modes for entry in SUITES["scaling"])
    assert STEPS["compile"] == (parts.FIRST_CALLS,)
    assert parts.MODELS in STEPS["model"]
    for name, steps in STEPS.items():
        names = [step.name for step in steps]
        assert names, name
        assert len(set(names)) == len(names), name


def test_the_default_suite_has_everything_that_a_page_shows():
    default = STEPS["default"]
    entries = [step for step in default if isinstance(step, Entry)]
    assert {entry.stage for entry in entries} == {entry.stage for entry in ENTRIES}
    assert {"tokens", "images", "experts", "capacity", "width"} >= {
        entry.axis.name for entry in entries if entry.axis
    }
    assert {"experts", "capacity", "width"} <= {entry.axis.name for entry in entries if entry.axis}
    assert any(entry.dtype == "bfloat16" for entry in entries)
    assert any("skew" in entry.shape for entry in entries)
    assert any(entry.memory for entry in entries)
    assert any("compiled" in entry.providers for entry in entries)
    assert {step.name for step in default if isinstance(step, Part)} == {
        "models",
        "stages",
        "first_calls",
    }
    by_name = {entry.name: entry for entry in ENTRIES}
    for entry in entries:
        known = by_name[entry.name]
        assert entry.shape == known.shape
        assert set(entry.providers) <= set(known.providers)
        assert entry.providers[-1] == "ours"
        assert all(goal.against in entry.providers for goal in entry.goals)


def test_the_default_suite_fits_ten_minutes_on_two_fast_cores():
    settings = Settings(seconds=run.DEFAULT_SECONDS)
    seconds = sum(
        step.seconds
        if isinstance(step, Part)
        else estimate.entry_seconds(step, settings, 2e11) + estimate.memory_seconds(step, settings)
        for step in STEPS["default"]
    )
    assert seconds < 60 * run.DEFAULT_MINUTES


def test_only_finds_entries_and_parts():
    found = suites.steps("default", "^models$|^overhead/combine$")
    assert [step.name for step in found] == ["models", "overhead/combine"]
    assert [step.name for step in suites.select("default", "^models$|^overhead/c")] == [
        "overhead/combine"
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "nonsense"], "--suite is 'nonsense'; expected one of default, cpu"),
        (["--only", "nothing-like-it"], "no entry of suite 'default' matches"),
        (["--only", "("], "not a regular expression"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--minutes", "inf"], "--minutes is inf"),
        (["--seconds", "-1"], "--seconds is -1; expected 0 or more"),
        (["--repeats", "4"], "--repeats is 4; expected at least 5"),
        (["--threads", "-1"], "--threads is -1; expected 0 or more"),
        (["--busy", "-1"], "--busy is -1; expected 0 or more"),
        (["--compare", "/nowhere/a", "/nowhere/b"], "/nowhere/a"),
    ],
)
def test_wrong_input_is_one_clear_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_list_shows_estimates_and_measures_nothing(capsys):
    assert run.main(["--list", "--only", "^combine/|^models$"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines][:1] == ["models"]
    assert all(" about " in line and " s  " in line for line in lines)
    assert all("ours" in line for line in lines[1:])


def test_a_run_of_nobodys_choice_is_not_among_the_stored_results():
    folder = run._default_folder("router")
    assert folder.name.startswith("router-")
    assert folder.parent == output.RUNS
    assert output.RESULTS not in folder.parents
    assert "runs/" in (ROOT / ".gitignore").read_text().splitlines()


def test_a_budget_keeps_time_for_the_report():
    clock = Time()
    budget = Budget(600.0, clock)
    assert budget.left == 600 - FINISH_SECONDS
    clock.now = 580.0
    assert (budget.spent, budget.left, budget.left_in_all) == (580, 0, 20)
    assert Budget(10.0, clock).left == 8
    assert Budget(None, clock).left == float("inf")
    clock.now = 700.0
    assert budget.left_in_all == 0


def spin():
    """For five seconds; what a provider raises would be caught."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            sum(range(1000))


def test_a_block_ends_when_its_time_is_over():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(OutOfTime, match="longer than 0 s"), at_most(0.01):
        spin()
    assert signal.getsignal(signal.SIGALRM) is before
    with at_most(float("inf")):
        assert signal.getsignal(signal.SIGALRM) is before


def test_a_limit_inside_another_does_not_end_it():
    def block():
        with time_limit(60.0):
            pass
        time.sleep(5)

    with pytest.raises(OutOfTime), at_most(0.2):
        block()
    with pytest.raises(TimeoutError), at_most(60.0), time_limit(0.01):
        time.sleep(5)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_limit_that_is_swallowed_comes_again(monkeypatch):
    def block():
        with contextlib.suppress(OutOfTime):
            time.sleep(5)
        time.sleep(5)

    monkeypatch.setattr(limit_module, "AGAIN_SECONDS", 0.1)
    with pytest.raises(OutOfTime), at_most(0.01):
        block()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A session with a minute, whose entries take the seconds of their name, and its clock."""
    clock = Time()

    def run_entry(entry, settings):
        word = entry.name.split("/")[1]
        if word == "broken":
            raise RuntimeError("first line\nsecond line")
        if word == "stuck":
            raise OutOfTime("took longer than 5 s")
        clock.now += float(word)
        empty = {key: {} for key in ("providers", "modes", "memory")}
        return {"name": entry.name, "seconds": float(word), **empty}

    monkeypatch.setattr(session, "run_entry", run_entry)
    monkeypatch.setattr(estimate, "entry_seconds", lambda entry, settings, flops: 10.0)
    document = {"rates": {}, "entries": [], "not_measured": [], "models": [], "settings": {}}
    return session.Session(document, tmp_path, Settings(), Budget(60.0, clock)), clock


def entries(*words):
    return [replace(ENTRIES[0], name=f"made/{word}", memory=()) for word in words]


def test_a_short_run_leaves_out_what_compiles_for_long(made, monkeypatch):
    ours, clock = made
    seen = []

    def entry_seconds(entry, settings, flops):
        return 30.0 if settings.compiled else 10.0

    def run_entry(entry, settings):
        seen.append(settings.compiled)
        return {"name": entry.name, "seconds": 1.0, "providers": {}, "modes": {}, "memory": {}}

    monkeypatch.setattr(estimate, "entry_seconds", entry_seconds)
    monkeypatch.setattr(session, "run_entry", run_entry)
    ours.budget = Budget(300.0, clock)
    ours._step(entries("1")[0], ours._entry)
    ours.experience = estimate.Experience()
    ours.budget = Budget(60.0, clock)
    ours._step(entries("2")[0], ours._entry)
    # 20 s of compiling are more than a third of the 48 s that a minute leaves.
    assert seen == [True, False]
    assert not ours.document["not_measured"]


def test_entries_run_until_the_time_is_used_up(made):
    ours, clock = made
    # 48 of the 60 s are for measuring. After 20 and 20 an entry is believed to take 20.
    ours.on_cpu(entries("20", "20.0", "1"))
    assert [result["name"] for result in ours.document["entries"]] == ["made/20", "made/20.0"]
    (left_out,) = ours.document["not_measured"]
    assert left_out == {"name": "made/1", "reason": "needs about 20 s; 8 s were left"}
    assert not ours.broken
    assert json.loads((ours.folder / "results.json").read_text())["entries"]
    assert clock.now == 40


def test_quick_entries_correct_the_estimate(made):
    ours, _ = made
    ours.on_cpu(entries("30", "2"))
    # 30 s for what should take 10: the next is thought to need 30, and 18 are left.
    assert [item["name"] for item in ours.document["not_measured"]] == ["made/2"]
    assert estimate.Experience().correct(2.0) == 2
    slow = estimate.Experience()
    slow.add(1.0, 100.0)
    assert slow.correct(2.0) == 2 * estimate.MOST


def test_an_error_or_a_stuck_entry_does_not_end_the_run(made, capsys):
    ours, _ = made
    ours.on_cpu(entries("broken", "stuck", "3"))
    assert [result["name"] for result in ours.document["entries"]] == ["made/3"]
    assert ours.document["not_measured"] == [
        {"name": "made/broken", "reason": "RuntimeError: first line"},
        {"name": "made/stuck", "reason": "took longer than 5 s"},
    ]
    assert ours.broken == ["made/broken"]
    assert "made/broken: not measured: RuntimeError: first line" in capsys.readouterr().out


def test_what_does_not_fit_into_memory_is_named(made, monkeypatch):
    ours, _ = made
    monkeypatch.setattr(estimate, "available_bytes", lambda: 2.0**20)
    shape = {"B": 1, "S": 512, "D": 512, "E": 8}
    huge = replace(ENTRIES[0], name="made/1", stage="ec_layer", shape=shape)
    ours.on_cpu([huge])
    (left_out,) = ours.document["not_measured"]
    assert "GiB are available" in left_out["reason"]
    monkeypatch.setattr(estimate, "available_bytes", lambda: None)
    assert estimate.why_not(huge, None) is None


def test_memory_is_estimated_about_right():
    entry = next(e for e in ENTRIES if e.name == "ec_layer/D768-T1024")
    weights = 8 * 2 * 4 * 768 * 768
    # At least the weights and their gradients, in fp32 and fp64; not ten times as much.
    assert weights * 24 < estimate.entry_bytes(entry) < 10 * weights * 24


def test_a_part_without_its_package_is_left_out_and_one_that_fails_is_broken(made):
    ours, _ = made

    def missing(context):
        raise ImportError("no module named x")
        yield

    def failing(context):
        context.document["models"].append({"seconds": context.seconds})
        yield "half of it"
        raise ValueError("why")

    ours.on_cpu([Part("missing", 1.0, missing, ""), Part("failing", 20.0, failing, "")])
    assert ours.document["not_measured"] == [
        {"name": "missing", "reason": "ImportError: no module named x"},
        {"name": "failing", "reason": "ValueError: why"},
    ]
    assert ours.broken == ["failing"]
    # Twice its estimate and at least a minute, but no more than is left.
    assert ours.document["models"] == [{"seconds": 48.0}]
    assert json.loads((ours.folder / "results.json").read_text())["models"]


def test_the_last_part_has_what_is_left(made):
    ours, clock = made
    seen = []

    def run_part(context):
        seen.append(context.seconds)
        clock.now += 10
        yield "one of many"

    first, last = (Part(name, 400.0, run_part, "") for name in ("first", "last"))
    ours.on_cpu([first, *entries("3"), last])
    assert [item["name"] for item in ours.document["not_measured"]] == ["first"]
    assert seen == [45.0]


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    real, seen = session.run_entry, []

    def run_entry(entry, settings):
        seen.append(entry.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(entry, settings)

    monkeypatch.setattr(session, "run_entry", run_entry)
    folder = tmp_path / "out"
    assert run.main([*TINY, "--only", "^dispatch/", "--out", str(folder)]) == 1
    document = output.read_run(folder)
    assert not document["complete"]
    assert len(document["entries"]) == 1
    assert "interrupted" in capsys.readouterr().out
    assert document["entries"][0]["name"] in (folder / "results.md").read_text()
    assert len((folder / "results.csv").read_text().splitlines()) == 1 + 3


def test_sigterm_ends_the_run_like_ctrl_c(tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def run_entry(entry, settings):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(session, "run_entry", run_entry)
    assert run.main([*TINY, "--only", "^dispatch/", "--out", str(tmp_path / "a")]) == 1
    assert "interrupted" in capsys.readouterr().out
    assert not output.read(tmp_path / "a")["complete"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("error", "words", "status"),
    [
        (KeyboardInterrupt(), "interrupted; not all pictures", 1),
        (ImportError("no matplotlib"), "No pictures: ImportError: no matplotlib", 0),
        (ZeroDivisionError("why"), "FAIL: an error ended the pictures", 1),
        (OutOfTime(), "No time was left for all pictures", 0),
    ],
)
def test_results_outlive_the_pictures(tmp_path, monkeypatch, capsys, error, words, status):
    def draw(folder, document):
        raise error

    monkeypatch.setattr(run.plots, "draw", draw)
    monkeypatch.setattr(run, "find_spec", lambda name: True)
    tiny = [argument for argument in TINY if argument != "--no-plots"]
    only = ["--only", "^dispatch/T2048-D384"]
    assert run.main([*tiny, *only, "--out", str(tmp_path / "a")]) == status
    assert words in capsys.readouterr().out
    assert output.read(tmp_path / "a")["complete"]
    assert (tmp_path / "a" / "results.md").is_file()


def test_an_error_makes_the_status_one(tmp_path, monkeypatch, capsys):
    def run_entry(entry, settings):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(session, "run_entry", run_entry)
    assert run.main([*TINY, "--only", "^dispatch/T2048-D384", "--out", str(tmp_path / "a")]) == 1
    assert "FAIL: an error ended dispatch/T2048-D384" in capsys.readouterr().out
    document = output.read_run(tmp_path / "a")
    assert document["complete"]
    assert document["not_measured"][0]["reason"] == "RuntimeError: no such instruction"


def test_rates_are_measured(monkeypatch):
    monkeypatch.setattr(limits, "LARGE_COPY", 2**20)
    found = MEASURED_RATES()
    assert set(found["product"]) == {"float32", "bfloat16"}
    assert all(1e8 < rate < 1e15 for rate in (*found["product"].values(), found["copy"]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two entries through the command: the document and its folder."""
    folder = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "rates", lambda: RATES)
        patch.setattr(run, "find_spec", lambda name: None)
        patch.setattr(run.shutil, "which", lambda name: None)
        only = "^dispatch/T2048-D384$|^ec_layer/D384-T128$"
        quick = ("--suite", "smoke", "--repeats", "5", "--seconds", "0", "--modes", "forward")
        assert run.main([*quick, "--only", only, "--profile", "--out", str(folder)]) == 0
    return output.read_run(folder), folder


def test_the_document_has_the_keys_that_its_readers_want(tiny):
    document, _ = tiny
    assert document["schema"] == 2
    assert document["complete"]
    assert document["seconds"] > 0
    assert document["rates"] == RATES
    assert {"name", "version", "status", "reason", "install"} <= set(document["libraries"][0])
    for key in ("compile", "models", "not_measured"):
        assert document[key] == []
    for result in document["entries"]:
        assert result["device"] == "cpu"
        assert result["axis"] is None
        assert result["seconds"] > 0
        for found in result["modes"].values():
            assert set(found["cost"]) == {"flops", "bytes"}
        assert result["calls"]["ours"]["mode"] == "forward"
        assert result["calls"]["ours"]["ops"] > 0
        assert result["calls"]["ours"]["device_reads"] == 0


def test_without_matplotlib_and_compiler_it_still_runs(tiny):
    document, folder = tiny
    assert not list(folder.glob("*.png"))
    assert document["settings"]["compiled"] is False
    (layer,) = [r for r in document["entries"] if r["stage"] == "ec_layer"]
    assert layer["providers"]["compiled"]["status"] == "skipped"


def test_the_missing_are_named(monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    compiler, pictures = run._missing(draw=True)
    assert "C++ compiler" in compiler
    assert "[bench]" in pictures
    assert run._missing(draw=False) == [compiler]


def test_profile_writes_traces_of_ours_and_the_strongest_alternative(tiny):
    document, folder = tiny
    (layer,) = [r for r in document["entries"] if r["stage"] == "ec_layer"]
    profiled = {row["provider"] for row in document["stages"] if row["entry"] == layer["name"]}
    assert {"ours", *session.strongest(layer)} <= profiled
    assert all((folder / row["trace"]).is_file() for row in document["stages"])


def test_the_strongest_alternative_is_plain_and_uncompiled():
    times = {"good_eager": 2.0, "one_hot": 3.0, "compiled": 1.0, "dense_limit": 0.5, "ours": 0.9}
    modes = {"forward": {"times": {name: {"median": value} for name, value in times.items()}}}
    assert session.strongest({"stage": "ec_layer", "modes": modes}) == ["good_eager"]
    assert session.strongest({"stage": "ec_layer", "modes": {}}) == []


def test_profile_has_its_own_entries():
    options = run._parser().parse_args(["--profile"])
    assert [step.name for step in run._steps(options, CPU)] == list(parts.PROFILED)
    on_gpu = run._steps(options, torch.device("cuda", 0))
    assert [step.name for step in on_gpu] == list(parts.PROFILED_ON_GPU)


def test_csv_has_a_row_for_each_mode_and_provider(tiny):
    document, folder = tiny
    with open(folder / "results.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == csv_table.COLUMNS
    timed = [row for row in rows if row["mode"] == "forward"]
    assert len(timed) == sum(
        len(found["times"]) for result in document["entries"] for found in result["modes"].values()
    )
    (ours,) = [row for row in timed if row["entry"].startswith("ec_") and row["provider"] == "ours"]
    assert ours["shape"] == "B=2 S=24 D=16 E=8"
    assert (ours["device"], ours["dtype"], ours["kind"]) == ("cpu", "float32", "ours")
    assert float(ours["median_seconds"]) > 0
    assert ours["ratio"] == ""
    assert float(ours["error"]) < 1e-5
    assert int(ours["ops"]) > 0
    (skipped,) = [row for row in rows if row["mode"] == "none"]
    assert (skipped["provider"], skipped["status"]) == ("compiled", "skipped")
    assert "no C++ compiler" in skipped["reason"]


def test_csv_has_what_a_gpu_was_probed_for():
    result = {
        "name": "gpu_x/T4",
        "shape": {"T": 4},
        "dtype": "bfloat16",
        "device": "cuda",
        "providers": {"ours": {"kind": "ours", "status": "ok", "errors": {"a": 1e-3}}},
        "modes": {
            mode: {"times": {"ours": {"median": 1.0, "low": 1.0, "high": 1.0}}, "ratios": {}}
            for mode in ("forward", "both")
        },
        "memory": {},
        "probes": {"ours": {"mode": "both", "host_syncs": 0, "kernels": 7, "copies": 1}},
    }
    forward, both = csv_table.rows(result)
    assert (both["kernels"], both["host_syncs"]) == (7, 0)
    assert "kernels" not in forward


def test_csv_has_memory_and_axis():
    result = {
        "name": "scaling_x/T4",
        "shape": {"T": 4},
        "dtype": "float32",
        "device": "cuda",
        "axis": {"name": "tokens", "value": 4.0},
        "providers": {
            "ours": {"kind": "ours", "status": "ok", "errors": {"a": 1e-7, "b": 2e-7}},
            "one_hot": {"kind": "plain", "status": "ok", "errors": {}},
        },
        "modes": {},
        "memory": {"ours": {"peak_bytes": 8, "saved_bytes": 4}, "one_hot": {"reason": "killed"}},
    }
    ours, other = csv_table.rows(result)
    assert (ours["mode"], ours["peak_bytes"], ours["saved_bytes"]) == ("memory", 8, 4)
    assert (ours["group"], ours["axis"], ours["value"]) == ("scaling_x", "tokens", 4.0)
    assert ours["error"] == 2e-7
    assert other["reason"] == "killed"
    assert set(ours) | set(other) <= set(csv_table.COLUMNS)


def test_a_gpu_and_the_cpu_share_the_default_suite(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert run.choose_devices("auto", "default") == [cuda, CPU]
    assert run.choose_devices("cpu", "default") == [CPU]
    assert run.choose_devices("auto", "layer") == [CPU]
    assert run.choose_devices("auto", "gpu") == [cuda]
    both = run._plans(run._parser().parse_args(["--only", "ec_layer"]))
    assert list(both) == [cuda, CPU]
    assert both[cuda][0].name.startswith("gpu_ec_layer/")
    assert both[CPU][0].name.startswith("ec_layer/")
    assert list(run._plans(run._parser().parse_args(["--only", "^models$"]))) == [CPU]
    assert list(run._plans(run._parser().parse_args(["--only", "gpu_ec_layer"]))) == [cuda]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.choose_devices("auto", "default") == [CPU]


def test_the_gpu_half_comes_first_and_leaves_time_for_the_cpu(made, monkeypatch):
    ours, clock = made
    seen = {}

    def measure(names, suite, device, settings, seconds, report):
        seen.update(names=names, suite=suite, device=device, seconds=seconds)
        clock.now += seconds
        missing = [
            {"name": names[1], "reason": "it did not return"},
            {"name": names[2], "reason": supervise.OUT_OF_TIME},
        ]
        return supervise.Measured([], missing, {"copy_tb_s": 3.0})

    def first_calls(entries, seconds):
        assert seconds == pytest.approx(0.6 * 48)
        clock.now += 8
        return {entries[0].name: {"first_s": 7.0, "second_s": 0.1}}

    monkeypatch.setattr(half, "measure", measure)
    monkeypatch.setattr(half, "first_calls", first_calls)
    monkeypatch.setattr(run.hardware, "query", lambda device, names: {"sm_mhz": 1980.0})
    ours.document["environment"] = {"device": {"gpu": "a GPU"}}
    options = run._parser().parse_args([])
    gpu = [*SUITES["gpu"], parts.MODELS]
    run._measure(ours, {torch.device("cuda", 0): gpu, CPU: entries("5")}, options)
    assert seen["names"] == [entry.name for entry in SUITES["gpu"]]
    assert (seen["suite"], seen["device"]) == ("gpu", "cuda")
    assert seen["seconds"] == pytest.approx(0.6 * 48 - 8)
    assert ours.document["first_call"] == {gpu[0].name: {"first_s": 7.0, "second_s": 0.1}}
    assert ours.document["environment"]["device"]["after"] == {"sm_mhz": 1980.0}
    assert [result["name"] for result in ours.document["entries"]] == ["made/5"]
    cpu_only, *others = ours.document["not_measured"]
    assert cpu_only == {"name": "models", "reason": "measured on a CPU only: --device cpu"}
    assert len(others) == 2
    assert ours.broken == [SUITES["gpu"][1].name]
    assert ours.document["rates"] == {"copy_tb_s": 3.0}


def test_a_gpu_half_that_fails_leaves_the_cpus(made, monkeypatch):
    ours, _ = made

    def first_calls(entries, seconds):
        raise OSError("no such program")

    monkeypatch.setattr(half, "first_calls", first_calls)
    ours.on_gpu(SUITES["gpu"], "gpu", 30.0)
    ours.on_cpu(entries("3"))
    assert ours.broken == ["the GPU's half"]
    (left_out,) = ours.document["not_measured"]
    assert left_out["reason"] == "OSError: no such program"
    assert [result["name"] for result in ours.document["entries"]] == ["made/3"]


def test_the_last_word_of_a_first_call_may_be_a_compilers():
    outcomes = {
        "first call a": Outcome(0, '{"first_s": 5.0}\na warning at exit\n', 9.0),
        "first call b": Outcome(0, "nothing", 9.0),
        "first call c": Outcome(1, '{"first_s": 5.0}', 9.0),
    }
    assert first_steps.first_calls(outcomes) == {"a": {"first_s": 5.0}}


def test_first_calls_are_made_by_few_layers_side_by_side(monkeypatch):
    seen = {}

    def run_jobs(jobs, at_once, seconds, folder):
        seen.update(names=[job.name for job in jobs], seconds=seconds)
        last = json.dumps({"first_s": 5.0, "second_s": 0.5})
        return {job.name: Outcome(0, last, 9.0) for job in jobs}

    monkeypatch.setattr(first_steps, "run_jobs", run_jobs)
    (cold,) = half.first_calls(SUITES["gpu"], 100.0)
    assert cold.startswith("gpu_ec_layer/")
    assert seen["names"][0] == f"first call {cold}"
    assert len(seen["names"]) == 1 + first_steps.MOST_WARMED
    assert all("scaling" not in name for name in seen["names"])
    assert seen["seconds"] == 25.0


def test_the_worker_understands_the_gpu_halfs_arguments(monkeypatch):
    seen = []

    def run_entries(names, arguments, seconds, report):
        seen.extend([*names, *arguments, "--seconds", str(seconds), "--out", "x"])
        return supervise.Measured()

    monkeypatch.setattr(supervise, "run_entries", run_entries)
    settings = Settings(7, 0.25, ("forward",), compiled=False, memory=False)
    half.measure(["a", "b"], "layer", "cuda", settings, float("inf"), print)
    options = worker._parser().parse_args(seen)
    assert options.names == ["a", "b"]
    assert (options.suite, options.device) == ("layer", "cuda")
    assert options.seconds == half.A_DAY
    assert worker.settings_of(options) == settings
