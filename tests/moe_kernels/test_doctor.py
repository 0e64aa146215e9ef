"""The doctor: what it says of this machine, and that it finds what is wrong with a backend.

Broken backends are stand-ins made of the reference, so that no compiler is needed.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moe_kernels as mk
from moe_kernels import backends
from moe_kernels.backends import reference
from moe_kernels.doctor import Diagnosis, __main__, diagnose, diagnosis, facts, programs, self_test

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def backend() -> None:
    """The doctor asks for each backend itself."""


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    return diagnose()


def test_every_backend_that_works_here_passes(found):
    assert found.ok, found.problems
    assert {check.backend for check in found.checks} == set(backends.BACKENDS)
    for check in found.checks:
        backend = backends.BACKENDS[check.backend]
        types = {device.type for device in self_test.devices()}
        works = any(backend.why_not("dispatch", each) is None for each in types)
        assert check.status == "ok" if works else check.detail
        assert bool(check.device) == (check.status == "ok")
        if check.status == "ok":
            assert re.match(r"float32: \d+% of the error allowed, equal bits", check.detail)


def test_the_text_has_everything(found):
    text = str(found)
    for name, value in found.facts.items():
        assert value, name
        assert f"{name} " in text
        assert value in text
    assert torch.__version__ in found.facts["PyTorch"]
    assert str(torch.get_num_threads()) in found.facts["threads"]
    for op in backends.OPS:
        assert f"\n  {op} " in text
    for check in found.checks:
        assert str(check) in text
    assert text.splitlines()[-1] == diagnosis.ALL_WELL


def test_json_has_the_same(found):
    data = json.loads(json.dumps(found.to_dict()))
    assert data["ok"] is True
    assert data["facts"] == found.facts
    assert [check["status"] for check in data["checks"]] == [c.status for c in found.checks]
    assert set(data) == {"ok", *vars(found)}


def test_nothing_of_the_caller_changes(few):
    few()
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with mk.use_backend("reference"), torch.no_grad():
        assert diagnose().ok
        assert not torch.is_grad_enabled()
        assert backends._Default.name == "reference"
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


# What is wrong is found


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leave the reference and a backend ``plug``: the reference with the given functions."""

    def install(record: str = "", module: str | None = "a_plug", **functions: Any) -> None:
        plug = backends.Backend("plug", "a plug", ("cpu",), module=module, record=record)
        known = {"plug": plug, "reference": backends.BACKENDS["reference"]}
        implementations = {**reference.IMPLEMENTATIONS, **functions}
        monkeypatch.setitem(sys.modules, "a_plug", SimpleNamespace(IMPLEMENTATIONS=implementations))
        monkeypatch.setattr(backends, "BACKENDS", known)
        monkeypatch.setattr(backends, "_loaded", {name: {} for name in known})
        monkeypatch.setattr(backends, "MEASURED", {})
        for name in ("_resolved", "_broken"):
            monkeypatch.setattr(backends, name, {})

    return install


def changed(op: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    function = reference.IMPLEMENTATIONS[op]
    return {op: lambda *args, **options: change(function(*args, **options))}


class _Wrong(torch.autograd.Function):
    """The value is right, the gradient is 0.1% too large."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        return upstream * 1.001


def stop(_: Any) -> Any:
    raise RuntimeError("no such instruction\nat address 7")


def checked(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    status = __main__.main([])
    return status, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        (changed("expert_mlp", lambda out: out * 1.0001), "token_choice's out errs by "),
        (changed("expert_mlp", _Wrong.apply), "token_choice's drouter_logits errs by 0.00"),
        (
            changed("combine", lambda out: out * torch.nan),
            "token_choice's combined holds NaN or inf",
        ),
        (changed("dispatch", lambda rows: rows + torch.rand(())), "differs between two equal runs"),
        (changed("router_z_loss", lambda loss: loss + 1), "token_choice's loss errs by "),
        (changed("dispatch", stop), "RuntimeError: no such instruction"),
    ],
    ids=["value", "gradient", "nan", "noise", "loss", "error"],
)
def test_a_broken_backend_is_found(functions, words, few, capsys):
    few(**functions)
    status, lines = checked(capsys)
    assert status == 1
    (problem,) = [line for line in lines if line.startswith("problem: ")]
    assert problem.startswith("problem: plug on cpu: ")
    assert words in problem
    assert lines[-1].startswith("What to do: run pip install again; until that helps, set MOE_KER")
    assert any(re.match(r"  plug on cpu +failed ", line) for line in lines)
    assert any(re.match(r"  reference on cpu +ok ", line) for line in lines)


def test_wrong_integers_are_found(few, monkeypatch):
    few()
    plain, exact = (self_test._layer("reference", *args) for args in _arguments())
    moved = {**plain, "expert_choice's token_indices": plain["expert_choice's token_indices"] + 1}
    monkeypatch.setattr(self_test, "_layer", lambda *_: moved)
    share, words = self_test._compare("plug", torch.device("cpu"), (), (plain, exact))
    assert words == "float32: expert_choice's token_indices is not the reference's"
    assert share <= 1


def _arguments() -> list[tuple[Any, ...]]:
    dtypes = [(torch.float32, torch.float32), (torch.float32, torch.float64)]
    return [(torch.device("cpu"), self_test.SMALL, *pair) for pair in dtypes]


def test_a_module_that_was_built_and_cannot_be_loaded_is_a_problem(few, monkeypatch, capsys):
    few(record="plug", module="no_such_module")
    record = {"plug": {"built": True}}
    for module in (backends, diagnosis):
        monkeypatch.setattr(module, "build_record", lambda: record)
    status, lines = checked(capsys)
    assert status == 1
    assert "problem: plug was built but cannot be loaded (No module named 'no_such" in str(lines)
    assert lines[-1].startswith("What to do: run pip install again, with this Python")
    record["plug"]["built"] = False
    monkeypatch.setattr(backends, "_broken", {})
    monkeypatch.setattr(backends, "why_not_built", lambda name: "was not built: of rain")
    status, lines = checked(capsys)
    assert status == 0
    assert any(re.match(r"  plug +not here +was not built: of rain", line) for line in lines)


def test_a_setting_that_a_backend_refuses_is_said(few, monkeypatch, capsys):
    few()

    def refuse(self: Any) -> Any:
        raise ValueError("MOE_KERNELS_X is 'y'; expected z.")

    whole = backends.Backend.implementations
    monkeypatch.setattr(
        backends.Backend,
        "implementations",
        lambda self: refuse(self) if self.name == "plug" else whole(self),
    )
    status, lines = checked(capsys)
    assert status == 1
    assert "problem: plug: ValueError: MOE_KERNELS_X is 'y'; expected z." in lines
    assert lines[-1] == "What to do: correct or unset the setting that the message names."


def test_a_request_that_nothing_meets_is_a_problem(few, capsys):
    few(module=None)
    with mk.use_backend("plug"):
        status, lines = checked(capsys)
    assert status == 1
    assert any("problem: backend 'plug' was requested for" in line for line in lines)
    assert lines[-1].startswith("What to do: unset MOE_KERNELS_BACKEND, or add another to it")
    with mk.use_backend("plug,reference"):
        assert checked(capsys)[0] == 0


def test_a_missing_triton_beside_a_gpu_is_a_problem(monkeypatch):
    broken = {"triton": "cannot be imported (No module named 'triton')"}
    monkeypatch.setattr(backends, "_broken", broken)
    check = self_test.Check("triton", "", "not here", broken["triton"])
    assert diagnosis._problem(check) is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")
    problem = diagnosis._problem(check)
    assert problem is not None
    assert problem.remedy == "run pip install triton"


# Facts


def test_every_setting_of_the_readme_is_known():
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"MOE_KERNELS_[A-Z_]+[A-Z]", text)) == set(facts.VARIABLES)


def test_unknown_settings_and_slow_modes_are_noted(monkeypatch):
    monkeypatch.setenv("MOE_KERNELS_BACKENDS", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    entries = {"cpu": {"built": True, "sanitize": "address"}, "cuda": {"sanitize": ""}}
    monkeypatch.setattr(diagnosis, "build_record", lambda: entries)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    other = SimpleNamespace(__file__="/elsewhere/_cpu.so")
    monkeypatch.setitem(sys.modules, "moe_kernels._cpu", other)
    notes = diagnosis._notes(["NVIDIA H100", "NVIDIA H100"])
    assert facts.environment()["MOE_KERNELS_BACKENDS"] == "cpu"
    assert any(note.startswith("nothing reads MOE_KERNELS_BACKENDS") for note in notes)
    assert any(note.startswith("TRITON_INTERPRET=1") for note in notes)
    assert "the cpu kernels check themselves (address), slowly" in notes
    assert any("PyTorch sees no GPU: it is built" in note for note in notes)
    assert not any("cuda kernels check" in note for note in notes)
    (note,) = [note for note in notes if "loaded from" in note]
    assert note.startswith("moe_kernels._cpu is loaded from /elsewhere/_cpu.so, of another")


def test_extras_are_complete_or_say_what_is_missing(monkeypatch):
    requirements = [
        "torch>=2.9",
        'no-such-plot>=3 ; extra == "train"',
        "torch>=2; extra == 'train'",
        'dit-moe-kernels[train] ; extra == "test"',
        'no_such_test; extra == "test"',
        'torch[x]>=1; extra == "bench"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    names = SimpleNamespace(get_all=lambda key: ["train", "test", "bench"])
    monkeypatch.setattr(metadata, "metadata", lambda name: names)
    assert facts.extras() == {
        "train": "without no-such-plot",
        "test": "without no-such-plot, no_such_test",
        "bench": "complete",
    }


def test_a_source_tree_has_no_extras(monkeypatch):
    monkeypatch.setattr(facts, "DISTRIBUTION", "no-such-distribution")
    assert facts.extras() == {}
    assert facts.machine("").get("moe_kernels", "").startswith("not installed, a source tree")


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)


@pytest.mark.skipif(os.name != "posix", reason="starts scripts")
def test_programs_say_their_versions_or_why_not(tmp_path, monkeypatch):
    for name in ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs, "USUAL_NVCC", tmp_path / "elsewhere" / "nvcc")
    assert programs.cpp_compiler() == "none: tried c++, g++, clang++"
    assert programs.nvcc().startswith("none: tried CUDACXX, CUDA_HOME, CUDA_PATH, PATH, ")
    assert programs.nvidia_driver() == ("none: nvidia-smi was not found", [])
    program(tmp_path, "g++", "print('g++ 12.2.0\\nCopyright')")
    program(tmp_path, "nvcc", "print('Cuda compilation tools, release 13.0, V13.0.88')")
    program(tmp_path, "nvidia-smi", "print('580.65, NVIDIA H100\\n580.65, NVIDIA L4')")
    assert programs.cpp_compiler() == "g++ 12.2.0 (g++)"
    assert programs.nvcc() == f"13.0 ({tmp_path}/nvcc)"
    assert programs.nvidia_driver() == ("580.65", ["NVIDIA H100", "NVIDIA L4"])
    program(tmp_path, "nvidia-smi", "import sys; sys.exit('no driver\\nis loaded')")
    driver, gpus = programs.nvidia_driver()
    assert driver.endswith("ended with 1 (no driver)")
    assert gpus == []
    monkeypatch.setattr(programs, "SECONDS", 0.2)
    program(tmp_path, "nvcc", "import time; time.sleep(60)")
    assert "timed out" in programs.nvcc()
    (tmp_path / "g++").write_text("not a program")
    assert "could not be run" in programs.cpp_compiler()
    monkeypatch.setenv("CXX", "ccache missing++")
    assert programs.cpp_compiler() == "none: ccache, from CXX, was not found"
    monkeypatch.setenv("CUDACXX", "no-nvcc")
    assert programs.nvcc() == "none: no-nvcc, from CUDACXX, was not found"


# The command


COMMAND = [sys.executable, "-m", "moe_kernels.doctor"]


def surroundings(**changes: str) -> dict[str, str]:
    """No interpreter and no simulated GPU: they are slow, and are tried above."""
    left_out = ("TRITON_INTERPRET", "MOE_KERNELS_SIMULATED_GPU", "MOE_KERNELS_BACKEND")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def test_json_command_from_any_folder_without_programs(tmp_path):
    result = subprocess.run(
        [*COMMAND, "--json"],
        cwd=tmp_path,
        env=surroundings(PATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    found = json.loads(result.stdout)
    assert result.returncode == 0, found["problems"]
    assert found["ok"] is True
    assert found["facts"]["C++ compiler"].startswith("none: ")
    assert found["facts"]["NVIDIA driver"].startswith("none: ")
    assert not list(tmp_path.iterdir())


def test_without_triton_and_compiled_modules(tmp_path):
    code = (
        "import runpy, sys, pathlib\n"
        "missing = ('triton', 'moe_kernels._cpu', 'moe_kernels._cuda')\n"
        "sys.modules.update(dict.fromkeys(missing))\n"
        "from moe_kernels import build_info\n"
        "build_info._RECORD = pathlib.Path('no such file')\n"
        "runpy.run_module('moe_kernels.doctor', run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=surroundings(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert any(re.match(r"  reference on cpu +ok ", line) for line in lines)
    assert any(re.match(r"  triton +not here +cannot be imported", line) for line in lines)
    assert any(
        re.match(r"  cpu +not here +was not built: this is a source", line) for line in lines
    )
    assert any(re.match(r"CPU kernels +none: was not built", line) for line in lines)


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    process = subprocess.Popen(
        COMMAND, cwd=tmp_path, env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 0, error
    assert error == b""
