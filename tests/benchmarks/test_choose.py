"""The choice between two backends from their times, and the table that it is written to."""

import copy
import json
from typing import Any

import pytest

from benchmarks import choose, output
from benchmarks.entry import BY_BACKEND, Entry
from benchmarks.environment import ROOT
from benchmarks.gpu.figures import figures_of
from benchmarks.gpu.limits import Limits
from benchmarks.registry import find_entry
from benchmarks.stages import STAGES
from moe_kernels.backends import BACKENDS, MEASURED, OPS, measured

CITED = "benchmarks/results/a-gpu.json"
OK = {"kind": "backend", "status": "ok", "errors": {}, "reason": ""}
FAST, EVEN = 1.75, 1.0


def result(stage: str, shape: str, **speedups: float) -> dict[str, Any]:
    """An entry as ``gpu_check`` stores it; Triton takes 70 us."""
    return {
        "name": f"gpu_{stage}/{shape}",
        "stage": stage,
        "providers": {"eager": OK, "ours:cuda": OK, "ours:triton": OK, "ours": OK},
        "modes": {
            mode: {
                "times": {
                    "ours:triton": {"median": 7e-5},
                    "ours:cuda": {"median": 7e-5 / speedup},
                    "ours": {"median": 7e-5},
                }
            }
            for mode, speedup in speedups.items()
        },
    }


def entry_of(stage: str, shape: str) -> Entry:
    return Entry(f"gpu_{stage}/{shape}", stage, {}, {}, ("forward",), (*BY_BACKEND, "ours"))


@pytest.fixture
def suite(monkeypatch):
    """The suite whose entries the document has."""
    entries = [entry_of("expert_choice", shape) for shape in ("S256", "S1024", "S4096")]
    entries += [entry_of("combine", "T8192"), entry_of("dispatch", "T8192")]
    entries.append(Entry("gpu_combine/eager", "combine", {}, {}, ("forward",), ("eager", "ours")))
    monkeypatch.setattr(choose, "GPU_ENTRIES", tuple(entries))


@pytest.fixture
def document(suite):
    return {
        "environment": {"device": {"capability": "9.0", "cuda": "13.0"}},
        "complete": True,
        "tests": {"tests/test_gpu.py": {"words": "3 passed", "seconds": 1.0, "failed": False}},
        "sanitizer": {"compute-sanitizer memcheck": {"words": "no errors", "failed": False}},
        "not_measured": [],
        "entries": [
            result("expert_choice", "S256", forward=1.5, backward=1.25, both=FAST),
            result("expert_choice", "S1024", forward=1.75, backward=1.25, both=FAST),
            result("expert_choice", "S4096", forward=2.0, backward=1.25, both=FAST),
            result("combine", "T8192", forward=EVEN, backward=EVEN),
            {**result("ec_layer", "B4", forward=FAST), "providers": {"ours": OK}},
        ],
    }


def test_an_op_is_chosen_where_it_is_never_slower(document):
    first, second = choose.choices(document, CITED)
    assert (first.op, first.arch, first.backend, first.over) == (
        "expert_choice",
        "sm_90",
        "cuda",
        "triton",
    )
    assert first.ratio == 1.75
    assert first.measurement == CITED
    assert first.entries == tuple(
        f"gpu_expert_choice/{shape}" for shape in ("S256", "S1024", "S4096")
    )
    assert (second.op, second.ratio) == ("combine", 1.0)


def only(document: dict[str, Any], stage: str) -> choose.Comparison:
    (found,) = [found for found in choose.compare(document) if found.op == stage]
    return found


def test_one_slower_mode_of_one_shape_keeps_triton(document):
    document["entries"][1] = result("expert_choice", "S1024", forward=3.0, backward=0.99, both=2.0)
    assert [entry.op for entry in choose.choices(document, CITED)] == ["combine"]
    reason = only(document, "expert_choice").why_triton()
    assert reason == "cuda is slower at gpu_expert_choice/S1024 backward 0.99x"


def test_expert_choice_has_to_earn_its_place(document):
    forward = document["entries"][1]["modes"]["forward"]
    forward["times"]["ours:cuda"]["median"] = 7e-5 / 1.45
    reason = only(document, "expert_choice").why_triton()
    assert reason == (
        "cuda's forward is 1.45x as fast at gpu_expert_choice/S1024, wanted is 1.5x at every shape"
    )
    assert [entry.op for entry in choose.choices(document, CITED)] == ["combine"]
    forward["times"]["ours:cuda"]["median"] = 7e-5 / 1.55
    assert only(document, "expert_choice").why_triton() is None


def test_a_partial_run_decides_nothing(document):
    del document["entries"][1]
    reason = only(document, "expert_choice").why_triton()
    assert reason == "gpu_expert_choice/S1024: not measured (it was left out of the run)"
    document["not_measured"] = [{"name": "gpu_expert_choice/S1024", "reason": "no time"}]
    reason = only(document, "expert_choice").why_triton()
    assert reason == "gpu_expert_choice/S1024: not measured (no time)"
    # An entry that does not time both backends is not missed, nor an op that has none at all.
    assert [entry.op for entry in choose.choices(document, CITED)] == ["combine"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("tests", "tests/test_gpu.py"), ("sanitizer", "compute-sanitizer memcheck")],
)
def test_a_run_with_a_failure_is_refused(document, kind, name):
    document[kind][name]["failed"] = True
    with pytest.raises(ValueError, match=f"failed in {name}; .* run make gpu-check again"):
        choose.compare(document)
    with pytest.raises(ValueError, match=name):
        choose.choices(document, CITED)


@pytest.mark.parametrize("name", ["ours:cuda", "ours:triton"])
@pytest.mark.parametrize("status", ["skipped", "wrong"])
def test_a_backend_that_was_not_timed_decides_nothing(document, name, status):
    entry = document["entries"][2]
    entry["providers"] = {**entry["providers"], name: {**OK, "status": status, "reason": "no"}}
    for found in entry["modes"].values():
        del found["times"][name]
    assert [entry.op for entry in choose.choices(document, CITED)] == ["combine"]
    reason = only(document, "expert_choice").why_triton()
    assert reason == f"gpu_expert_choice/S4096: {name} is {status} (no)"


def test_what_was_not_timed_at_all_decides_nothing(document):
    document["entries"][0]["modes"] = {}
    assert "because ours is wrong" in (only(document, "expert_choice").why_triton() or "")
    del document["entries"][3]["modes"]["forward"]
    reason = only(document, "combine").why_triton()
    assert reason == "gpu_combine/T8192: the forward was not timed"


def test_only_nvidia_gpus_have_both_backends(document):
    document["environment"]["device"]["cuda"] = None
    with pytest.raises(ValueError, match="not of gpu_check on an NVIDIA GPU"):
        choose.choices(document, CITED)
    del document["environment"]
    with pytest.raises(ValueError, match="not of gpu_check on an NVIDIA GPU"):
        choose.choices(document, CITED)


@pytest.fixture
def place(tmp_path, monkeypatch, document):
    """A repository with one result and an empty table; returns the result's path."""
    path = tmp_path / CITED
    path.parent.mkdir(parents=True)
    path.write_text(output.text(document))
    monkeypatch.setattr(choose, "ROOT", tmp_path)
    monkeypatch.setattr(measured, "TABLE", tmp_path / "measured.json")
    measured.TABLE.write_text("[]\n")
    return path


def read() -> measured.Table:
    return measured.read(measured.TABLE, OPS, BACKENDS)


def test_the_command_says_why_and_writes_only_when_asked(place, document, capsys):
    document["entries"][3] = result("combine", "T8192", forward=0.5, backward=EVEN)
    document["not_measured"] = [{"name": "gpu_dispatch/T8192", "reason": "no time"}]
    place.write_text(output.text(document))
    assert choose.main([str(place)]) == 0
    said = capsys.readouterr().out
    assert (
        "combine on sm_90 stays with triton: cuda is slower at gpu_combine/T8192 forward 0.50x"
        in said
    )
    assert f"expert_choice on sm_90: cuda, 1.75x as fast as triton ({CITED}, 3 shapes)" in said
    assert "not measured: gpu_dispatch/T8192 (no time)" in said
    assert read() == {}
    assert choose.main([str(place), "--update"]) == 0
    assert list(read()) == [("expert_choice", "sm_90")]


def test_an_update_replaces_what_was_measured_and_keeps_the_rest(place, document):
    assert choose.main([str(place), "--update"]) == 0
    before = read()
    other = copy.deepcopy(document)
    other["environment"]["device"]["capability"] = "12.0"
    place.with_name("b-gpu.json").write_text(output.text(other))
    assert choose.main([str(place.with_name("b-gpu.json")), "--update"]) == 0
    assert set(read()) == {*before, ("expert_choice", "sm_120"), ("combine", "sm_120")}
    # Measured again, combine is slower: its entry goes, that of the other GPU stays.
    document["entries"] = [result("combine", "T8192", forward=0.5, backward=EVEN)]
    place.write_text(output.text(document))
    assert choose.main([str(place), "--update"]) == 0
    assert set(read()) == {
        ("expert_choice", "sm_90"),
        ("expert_choice", "sm_120"),
        ("combine", "sm_120"),
    }
    lines = measured.TABLE.read_text().splitlines()
    assert len(lines) == 5
    assert json.loads(lines[1].rstrip(","))["arch"] == "sm_120"
    choose.update(measured.TABLE, OPS, "sm_90", [])
    choose.update(measured.TABLE, OPS, "sm_120", [])
    assert measured.TABLE.read_text() == "[]\n"


def test_results_that_cannot_be_cited_or_compared_are_refused(place, document, tmp_path, capsys):
    outside = tmp_path / "elsewhere.json"
    outside.write_text(output.text(document))
    assert choose.main([str(outside)]) == 2
    assert "is not under benchmarks/results/" in capsys.readouterr().err
    document["entries"] = document["entries"][-1:]
    place.write_text(output.text(document))
    assert choose.main([str(place), "--update"]) == 2
    assert "has no op with ours:cuda and ours:triton" in capsys.readouterr().err
    document["tests"]["tests/test_gpu.py"]["failed"] = True
    place.write_text(output.text(document))
    assert choose.main([str(place), "--update"]) == 2
    assert "failed in tests/test_gpu.py" in capsys.readouterr().err
    assert read() == {}
    assert choose.main([str(place.with_name("none.json"))]) == 2
    assert "none.json" in capsys.readouterr().err


def unrepeatable(table: measured.Table) -> list[str]:
    """Entries that do not follow from the file that they cite."""
    return [
        entry.words()
        for entry in table.values()
        if not (choose.ROOT / entry.measurement).is_file()
        or entry
        not in choose.choices(output.read(choose.ROOT / entry.measurement), entry.measurement)
    ]


def test_every_shipped_entry_follows_from_the_file_that_it_cites():
    assert choose.ROOT == ROOT
    assert unrepeatable(MEASURED) == []


def test_an_entry_that_does_not_follow_is_found(place, document):
    assert choose.main([str(place), "--update"]) == 0
    assert unrepeatable(read()) == []
    edited = measured.TABLE.read_text().replace('"ratio": 1.75', '"ratio": 2.75')
    measured.TABLE.write_text(edited)
    (found,) = unrepeatable(read())
    assert "2.75x" in found
    failed = copy.deepcopy(document)
    failed["tests"]["tests/test_gpu.py"]["failed"] = True
    place.write_text(output.text(failed))
    with pytest.raises(ValueError, match=r"failed in tests/test_gpu\.py"):
        unrepeatable(read())
    place.unlink()
    assert len(unrepeatable(read())) == 2


class OneSecond(Limits):
    """A device that moves a byte a second."""

    largest_copy = 2**30

    def __init__(self) -> None:
        pass

    def copy_bytes(self, size: int) -> float:
        return 1.0


def test_the_speedup_and_the_goal_of_the_whole_batch_are_figures():
    entry = find_entry("gpu_expert_choice/B1-S1048576-E16")
    reads = 3 * entry.shape["B"] * entry.shape["S"] * entry.shape["E"] * 4.0
    timed = {"ours:cuda": 2.0, "ours:triton": 3.0, "ours": 2 * reads}
    found = {
        "modes": {
            "forward": {
                "times": {name: {"median": seconds} for name, seconds in timed.items()},
                "ratios": {},
                "host": {"ours": {"median": 1.0}},
                "graph": {},
            }
        },
        "providers": {},
        "probes": {},
        "memory": {},
    }
    figures = figures_of(entry, STAGES[entry.stage], found, OneSecond())
    assert figures["forward.cuda_speedup"] == 1.5
    wanted = {goal.figure: goal.at_least for goal in entry.figures}
    assert figures["forward.copy_share"] == pytest.approx(wanted["forward.copy_share"])
