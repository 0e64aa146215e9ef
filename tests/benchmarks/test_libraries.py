"""Adapters of other libraries against fp64 wherever they import, or on stand-ins; the reasons."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import libraries
from benchmarks.check import Verdict, hold_ours_to_plain, judge
from benchmarks.entry import Run
from benchmarks.libraries import (
    EXPERTS,
    LIBRARIES,
    Experts,
    Library,
    Unavailable,
    __main__,
    survey,
)
from benchmarks.libraries import transformer_engine as te
from benchmarks.libraries.survey import record
from benchmarks.registry import ENTRIES
from benchmarks.registry_gpu import GPU_ENTRIES
from benchmarks.stages import STAGES

from . import library_stand_ins as stand_ins
from .library_cases import NAMES, case, errors, exact

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# Rounding is 2e-7 in fp32 and 3e-3 in bf16 at these sizes; a wrong row or half makes 1.
LARGEST = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
IN_TRITON = ("liger", "moe_ops")
# What the stages of all libraries read.
ON_A_GPU: dict[str, Any] = {"B": 2, "S": 256, "T": 512, "D": 128, "E": 8, "K": 2, "shared": 0}
ON_A_GPU |= {"router": "token_choice"}


def assert_right(found: dict[str, float], dtype: torch.dtype = torch.float32) -> None:
    assert set(found) == {"out", *(f"d{name}" for name in NAMES)}
    assert max(found.values()) < LARGEST[dtype], found


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("collapsed", [False, True])
@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
def test_transformers_is_right(backend, collapsed, dtype):
    pytest.importorskip("transformers")
    experts = EXPERTS[f"transformers_{backend}"].on(CPU)
    assert_right(errors(experts, case(dtype, collapsed)), dtype)


def test_transformers_backends_are_what_their_names_say(monkeypatch):
    moe = pytest.importorskip("transformers.integrations.moe")
    called = []
    for backend in ("batched_mm", "grouped_mm"):
        original = moe.ALL_EXPERTS_FUNCTIONS[backend]

        def spy(*arguments: Any, name=backend, forward=original) -> torch.Tensor:
            called.append(name)
            return forward(*arguments)

        monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, backend, spy)
    for backend in ("batched_mm", "eager", "grouped_mm"):
        errors(EXPERTS[f"transformers_{backend}"].on(CPU), case())
    assert called == ["batched_mm", "grouped_mm"]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Errors of the Triton libraries, from a program of its own: Triton reads the variable once."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.library_cases", *IN_TRITON],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", IN_TRITON)
def test_triton_libraries_are_right_in_the_interpreter(interpreted, name):
    found = interpreted[name]
    if isinstance(found, str):
        pytest.skip(f"{name}: {found}")
    assert_right(found)


# Not marked ``gpu``: what another library computes does not decide whether this one's check passes.
@pytest.mark.parametrize("name", ["transformer_engine", *EXPERTS])
def test_libraries_are_right_on_a_gpu(name):
    """At sizes that every library takes; expert MLPs and rows in bf16, which some want."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    known = EXPERTS[name].library if name in EXPERTS else te.LIBRARY
    reason = known.why_not_importable() or known.why_not_on(CUDA) or known.left_out().get(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    for key in known.stages:
        stage, dtype = STAGES[key], torch.float32 if key == "token_choice" else torch.bfloat16
        inputs = stage.make_inputs(ON_A_GPU, dtype, CUDA)
        runs: dict[str, Run | str] = {name: stage.providers[name].build(inputs)}
        verdict = judge(stage, inputs, runs, dtype)[name]
        assert verdict.status == "ok", verdict.reason


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("collapsed", [False, True])
@pytest.mark.parametrize("name", ["scattermoe", "sonicmoe"])
def test_an_adapter_calls_its_library_as_documented(monkeypatch, name, collapsed, dtype):
    stand_ins.install(monkeypatch, **getattr(stand_ins, name)())
    experts = EXPERTS[name].experts.make()
    assert_right(errors(experts, case(dtype, collapsed)), dtype)
    with torch.no_grad():
        x, weights, w_in, w_out = case(dtype).leaves
        assert experts(x, weights, case(dtype).chosen, w_in, w_out).shape == x.shape


@pytest.mark.parametrize(
    ("stage", "shape"),
    [
        ("token_choice", {"T": 33, "E": 8, "K": 2}),
        ("token_choice", {"T": 40, "E": 8, "K": 2, "skew": "collapsed"}),
        ("dispatch", {"T": 33, "D": 20, "E": 8, "K": 2}),
        ("combine", {"router": "token_choice", "T": 33, "D": 20, "E": 8, "K": 2}),
        ("combine", {"router": "expert_choice", "T": 512, "D": 12, "E": 8, "K": 2}),
    ],
)
def test_transformer_engine_is_called_as_documented(monkeypatch, stage, shape):
    stand_ins.install(monkeypatch, **stand_ins.transformer_engine())
    monkeypatch.setattr(te, "LIBRARY", replace(te.LIBRARY, devices=("cpu",)))
    inputs = STAGES[stage].make_inputs(shape, torch.float32)
    name = "transformer_engine"
    runs: dict[str, Run | str] = {name: STAGES[stage].providers[name].build(inputs)}
    verdict = judge(STAGES[stage], inputs, runs, torch.float32)[name]
    assert verdict.status == "ok", verdict.reason
    assert {f"d{leaf}" for leaf in inputs.leaves} < set(verdict.errors)


def failing(error: BaseException) -> Callable[[], object]:
    def load() -> object:
        raise error

    return load


def library(**given: Any) -> Library:
    given = {"module": "torch", "load": lambda: None, "install": ("pip install it",), **given}
    return Library(name="It", distribution="it-that-is-not-there", **given)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no GPU\nand more"),
        OSError("no GPU"),
        ImportError("no GPU"),
        AssertionError("no GPU"),
        SystemExit("no GPU"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_an_import_fails_with_is_the_reason(error):
    found = record(library(load=failing(error)), CPU)
    assert found["status"] == "skipped"
    assert found["reason"] == f"{type(error).__name__}: no GPU"


def test_an_import_that_ends_the_process_does_not_end_a_run():
    here = library(devices=("cpu",))
    with pytest.raises(Unavailable, match="SystemExit: no GPU"):
        here.on(CPU, failing(SystemExit("no GPU")))
    with pytest.raises(OSError, match="no GPU"):
        here.on(CPU, failing(OSError("no GPU")))
    assert here.on(CPU, lambda: 7) == 7
    with pytest.raises(Unavailable, match="needs a CUDA device"):
        library().on(CPU, lambda: 7)


def test_an_import_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(libraries.library, "IMPORT_SECONDS", 0.05)
    found = record(library(load=lambda: time.sleep(20)), CPU)
    assert (found["status"], found["reason"]) == (
        "skipped",
        "TimeoutError: took longer than 0 s",
    )


def test_providers_that_cannot_be_made_are_named():
    experts = {
        "good": Experts(lambda: exact, "one"),
        "bad": Experts(failing(ImportError("too new")), "two"),  # type: ignore[arg-type]
    }
    here = record(library(devices=("cpu",), experts=experts), CPU)
    assert (here["status"], here["reason"]) == ("used", "without bad: ImportError: too new")
    elsewhere = record(library(experts=experts), CPU)["reason"]
    assert elsewhere == "needs a CUDA device, this is the CPU; without bad: ImportError: too new"


def test_a_library_that_is_not_installed_says_so():
    missing = ModuleNotFoundError("No module named 'it_that_is_not_there'")
    given = {"module": "it_that_is_not_there", "load": failing(missing)}
    found = record(library(**given), CPU)
    assert (found["status"], found["reason"], found["version"]) == (
        "skipped",
        "not installed",
        None,
    )
    assert found["install"] == ["pip install it"]
    in_extra = record(library(**given, extra="bench"), CPU)
    assert 'pip install "dit-moe-kernels[bench]"' in in_extra["reason"]


def test_ctrl_c_in_an_import_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        record(library(load=failing(KeyboardInterrupt())), CPU)


def test_devices_and_capabilities(monkeypatch):
    found = record(library(), CPU)
    assert (found["status"], found["reason"]) == (
        "importable",
        "needs a CUDA device, this is the CPU",
    )
    assert record(library(devices=("cpu", "cuda")), CPU)["status"] == "used"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert record(library(), CUDA)["status"] == "used"
    assert record(library(capability=(8, 6)), CUDA)["status"] == "used"
    hopper = library(capability=(9, 0))
    assert record(hopper, CUDA)["reason"] == "needs compute capability 9.0, this is 8.6"
    with pytest.raises(Unavailable, match=r"9\.0, this is 8\.6"):
        hopper.require_on(CUDA)


def test_the_survey_has_every_library_and_is_json():
    found = survey("cpu")
    assert [of_one["name"] for of_one in found] == [library.name for library in LIBRARIES]
    assert json.loads(json.dumps(found)) == found
    for of_one, known in zip(found, LIBRARIES, strict=True):
        assert of_one["status"] in ("used", "importable", "skipped")
        assert bool(of_one["reason"]) == (of_one["status"] != "used")
        assert of_one["install"]
        assert of_one["providers"] == list(known.experts)
        if "cpu" not in known.devices:
            assert of_one["status"] != "used"


def test_the_extra_has_what_installs_by_plain_pip():
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extra = metadata["project"]["optional-dependencies"]["bench"]
    required = {re.split(r"[ >=;]", requirement)[0] for requirement in extra}
    assert {known.distribution for known in LIBRARIES if known.extra == "bench"} <= required
    assert not {known.distribution for known in LIBRARIES if known.extra is None} & required
    pinned = (ROOT / "constraints.txt").read_text()
    assert all(f"\n{name}==" in pinned for name in required)


def test_the_command_prints_the_table(capsys):
    assert __main__.main(["--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for library in LIBRARIES:
        lines = [line for line in printed.splitlines() if line.startswith(library.name)]
        assert len(lines) == 1 + len(library.install)
        assert lines[1].endswith(library.install[0])


def test_entries_list_only_providers_that_their_device_has():
    """And on a GPU every library has an entry."""
    only_cuda = {name for name, known in EXPERTS.items() if "cpu" not in known.library.devices}
    only_cuda |= {"transformer_engine"}
    assert set(EXPERTS) < set(STAGES["dit_moe_layer"].providers)
    for entry in ENTRIES:
        assert not only_cuda & set(entry.providers), entry.name
    on_gpu = {(entry.stage, name) for entry in GPU_ENTRIES for name in entry.providers}
    assert {("dit_moe_layer", name) for name in only_cuda - {"transformer_engine"}} < on_gpu
    for stage in te.LIBRARY.stages:
        assert (stage, "transformer_engine") in on_gpu


def test_ours_is_not_held_to_the_error_of_a_library():
    """An inaccurate library would otherwise excuse ours."""
    stage = STAGES["dit_moe_layer"]
    errors = {"ours": 1e-3, "liger": 1e-2, "good_eager": 1e-6}
    verdicts = {name: Verdict("ok", {"out": error}) for name, error in errors.items()}
    hold_ours_to_plain(stage, verdicts, torch.float32)
    assert verdicts["ours"].status == "wrong"
    verdicts = {"ours": Verdict("ok", {"out": 1e-3}), "good_eager": Verdict("ok", {"out": 1e-3})}
    hold_ours_to_plain(stage, verdicts, torch.float32)
    assert verdicts["ours"].status == "ok"


def test_every_provider_of_a_library_says_so():
    for stage in ("dit_moe_layer", "token_choice", "dispatch", "combine"):
        marked = {name for name, found in STAGES[stage].providers.items() if found.library}
        assert marked == (set(EXPERTS) if stage == "dit_moe_layer" else {"transformer_engine"})
