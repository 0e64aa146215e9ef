"""The build of the modules: settings, records, ninja or not, and no code shared between ISAs.

What compiles does so on a tiny tree of its own; see ``build_trees.py``. The CUDA kernels are in
``test_build_cuda.py``.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import build_cpu
import build_native
import build_steps
import build_tools
import pytest
from build_tools import BuildError

from moe_kernels import build_info

from .build_trees import HEADER, ROOT, environment, found, make_tree, needs_compiler, run


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a project with the layout of this one and next to nothing in it."""
    return make_tree(tmp_path)


def build(tree: Path, **settings: str) -> dict:
    build_native.build_modules(tree, [tree / "moe_kernels"], environment(**settings))
    return json.loads((tree / "moe_kernels" / "_build.json").read_text())["cpu"]


def load(folder: Path) -> str:
    """Import the module in a fresh process and return the names that its kernels give."""
    code = "import moe_kernels._cpu as m; print(m.first, getattr(m, 'last', ''))"
    result = run(folder, "-c", code)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


EXPECTED = "baseline avx512" if "avx512" in build_cpu.isas() else "baseline"


# Settings


def test_settings_are_read():
    assert build_tools.build_choice({}) == "auto"
    assert build_tools.build_choice({"MOE_KERNELS_BUILD": "none"}) == "none"
    assert build_tools.build_choice({"MOE_KERNELS_BUILD": "cuda"}) == "cuda"
    assert not build_tools.wants_simulated({})
    assert build_tools.wants_simulated({"MOE_KERNELS_SIMULATED": "1"})
    assert build_tools.sanitizers({}) == ()
    both = {"MOE_KERNELS_SANITIZE": "undefined, address"}
    assert build_tools.sanitizers(both) == ("address", "undefined")
    assert build_tools.max_jobs({}) is None
    assert build_tools.max_jobs({"MAX_JOBS": "3"}) == 3


@pytest.mark.parametrize(
    ("read", "name", "value", "message"),
    [
        ("build_choice", "MOE_KERNELS_BUILD", "gpu", "is 'gpu'; expected auto, cpu, cuda, none"),
        ("sanitizers", "MOE_KERNELS_SANITIZE", "address,x", "'x'; expected a list of address, und"),
        ("max_jobs", "MAX_JOBS", "many", "'many'; expected a positive integer"),
        ("max_jobs", "MAX_JOBS", "0", "'0'; expected a positive integer"),
    ],
)
def test_wrong_settings_are_named(read, name, value, message):
    with pytest.raises(BuildError, match=f"{name}.*{message}"):
        getattr(build_tools, read)({name: value})


def test_isas_of_an_architecture():
    assert build_cpu.isas("x86_64") == build_cpu.isas("AMD64")
    assert build_cpu.isas("x86_64") == ("baseline", "avx2", "avx512")
    assert build_cpu.isas("aarch64") == build_cpu.isas("arm64") == ("baseline",)
    assert "-march=native" not in str(build_cpu.ISA_FLAGS)


# Steps and the ninja file


def steps(tree: Path, monkeypatch: pytest.MonkeyPatch, sanitize=(), **settings: str):
    monkeypatch.setattr(build_cpu, "binding_flags", lambda: ["headers"])
    compiler = build_tools.Compiler(("ccache", "g++"), "g++ 12")
    return build_cpu.compile_steps(tree, compiler, sanitize, settings)


def test_steps_compile_each_kernel_once_an_isa(tree, monkeypatch):
    monkeypatch.setattr(build_cpu, "isas", lambda: tuple(build_cpu.ISA_FLAGS))
    bindings, baseline, avx2, avx512, link = steps(tree, monkeypatch, CXXFLAGS="-DUSER=1")
    assert bindings.command[:2] == ("ccache", "g++")
    assert {"-DMOE_HAS_AVX2=1", "-DMOE_HAS_AVX512=1", "headers"} <= set(bindings.command)
    assert not any(word.startswith("-m") for word in (*bindings.command, *baseline.command))
    assert {"-DMOE_ISA=baseline", "-DMOE_ISA_BASELINE=1", "-O3"} <= set(baseline.command)
    assert {"-DMOE_ISA=avx2", "-DMOE_ISA_AVX2=1", "-mavx2", "-DUSER=1"} <= set(avx2.command)
    assert {"-DMOE_ISA=avx512", "-DMOE_ISA_AVX512=1", "-mavx512f"} <= set(avx512.command)
    assert "headers" not in avx2.command
    assert link.inputs == tuple(step.output for step in (bindings, baseline, avx2, avx512))
    assert "-Werror" not in avx2.command
    assert "-Werror" in steps(tree, monkeypatch, MOE_KERNELS_WERROR="1")[0].command


def test_sanitized_objects_live_apart(tree, monkeypatch):
    plain = steps(tree, monkeypatch)
    checked = steps(tree, monkeypatch, ("address", "undefined"))
    flags = {"-fsanitize=address,undefined", "-O1", "-g", "-fno-omit-frame-pointer"}
    assert flags | {"-fno-sanitize-recover=undefined"} <= set(checked[0].command)
    assert {"-O3", "-s"}.isdisjoint(word for step in checked for word in step.command)
    assert {step.output for step in plain}.isdisjoint(step.output for step in checked)


def test_ninja_text_escapes_and_asks_for_headers():
    text = build_steps.ninja_text(
        [
            build_steps.Step(("a b.cpp",), "out/a.o", ("c++", "-DX=$1", "-c", "a b.cpp")),
            build_steps.Step(("out/a.o",), "out/m.so", ("c++", "-shared", "out/a.o")),
        ]
    )
    assert "build out/a.o: compile a$ b.cpp\n  words = c++ '-DX=$$1' -c 'a b.cpp'\n" in text
    assert "build out/m.so: link out/a.o\n" in text
    assert "builddir = out\n" in text
    assert "deps = gcc\n" in text


# The record


def test_reasons_say_what_to_do(tmp_path, monkeypatch):
    record = tmp_path / "_build.json"
    monkeypatch.setattr(build_info, "_RECORD", record)
    assert build_info.build_record() == {}
    assert build_info.why_not_built("cpu").endswith("never installed; run pip install -e .")
    record.write_text(json.dumps({"cpu": {"built": False, "reason": "of rain; wait"}}))
    assert build_info.why_not_built("cpu") == "was not built: of rain; wait"
    assert "no other module" in build_info.why_not_built("other")
    record.write_text(json.dumps({"cpu": {"built": True, "reason": ""}}))
    assert "not for this Python" in build_info.why_not_built("cpu")


def test_without_a_compiler_the_reason_is_recorded(tree, capsys):
    for settings in ({"CXX": "/nonexistent"}, {"PATH": "", "CXX": ""}):
        record = build(tree, **settings)
        assert not record["built"]
        assert "was not found" in record["reason"] or "no C++ compiler" in record["reason"]
        assert "run pip install again" in record["reason"]
        assert f"not built, because {record['reason']}" in capsys.readouterr().out
    with pytest.raises(BuildError, match="/nonexistent"):
        build(tree, CXX="/nonexistent", MOE_KERNELS_BUILD="cpu")


def test_nothing_older_stays_behind_none(tree):
    old = tree / "moe_kernels" / "_cpu.cpython-311-x86_64-linux-gnu.so"
    old.touch()
    assert "MOE_KERNELS_BUILD was 'none'" in build(tree, MOE_KERNELS_BUILD="none")["reason"]
    assert not old.exists()


# Real builds


@needs_compiler
@pytest.mark.parametrize("with_ninja", [True, False], ids=["ninja", "no ninja"])
def test_builds_and_sees_changed_headers(tree, monkeypatch, with_ninja):
    if with_ninja and not found(build_tools.find_ninja):
        pytest.skip("needs ninja")
    if not with_ninja:
        monkeypatch.setattr(build_steps, "find_ninja", lambda environ: None)
    record = build(tree, MAX_JOBS="1")
    assert record["built"], record
    assert re.match(r"\S+ \d+\.\d+", record["compiler"])
    assert record["isas"] == list(build_cpu.isas())
    assert record["sanitize"] == record["reason"] == ""
    assert load(tree) == EXPECTED

    header = tree / "csrc" / "cpu" / "text.hpp"
    header.write_text(HEADER.replace("#x", '#x "!"'))
    os.utime(header, (header.stat().st_mtime + 10,) * 2)  # a clock with coarse ticks
    build(tree, MAX_JOBS="1")
    assert load(tree) == " ".join(f"{name}!" for name in EXPECTED.split())


@needs_compiler
def test_compiler_error_is_recorded_and_removes_the_module(tree):
    assert build(tree)["built"]
    (tree / "csrc" / "cpu" / "kernel.cpp").write_text("#error no kernel today\n")
    record = build(tree)
    assert not record["built"]
    assert "kernel.cpp:1:2: error: #error no kernel today" in record["reason"].replace("\\", "/")
    assert not list((tree / "moe_kernels").glob("_cpu.*"))


@needs_compiler
def test_source_distribution_makes_a_wheel_with_the_module(tree):
    """What ``pip install`` does, without its isolated environment."""
    result = run(tree, "setup.py", "-q", "sdist")
    assert result.returncode == 0, result.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tree / "unpacked", filter="data")
    (source,) = (tree / "unpacked").iterdir()
    result = run(source, "setup.py", "-q", "bdist_wheel")
    assert result.returncode == 0, result.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tree / "installed")
    assert load(tree / "installed") == EXPECTED
    assert not list((source / "moe_kernels").glob("_cpu.*"))

    # Again in the same folder: what the first wheel left in build/ is not packed again.
    result = run(source, "setup.py", "-q", "bdist_wheel", MOE_KERNELS_BUILD="none")
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        record = json.loads(file.read("moe_kernels/_build.json"))
    assert not record["cpu"]["built"]
    assert not [name for name in names if "_cpu." in name]


def test_explicit_build_that_fails_ends_setup(tree):
    words = ("setup.py", "-q", "build_ext", "--inplace")
    result = run(tree, *words, MOE_KERNELS_BUILD="cpu", CXX="/nonexistent")
    assert result.returncode != 0
    assert "error: the C++ compiler /nonexistent (from CXX) was not found" in result.stderr
    assert "Traceback" not in result.stderr


# No code shared between ISAs

# What a compiler adds by itself; none of it holds instructions of an ISA.
BUILTIN = re.compile(
    r"DW\.ref\.__gxx_personality_v0|__clang_call_terminate|__x86\.get_pc_thunk\.\w+"
)


def shared_symbols(path: Path, isa: str) -> list[str]:
    """List what an object offers to the linker besides the functions of its own ISA.

    The linker keeps one copy of, say, ``std::vector<float>::resize``. If it keeps that of AVX-512,
    a processor without it crashes in code that was compiled for the baseline.
    """
    result = subprocess.run(
        ["nm", "-C", "--defined-only", "--extern-only", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    names = [line.split(maxsplit=2)[2] for line in result.stdout.splitlines() if line.strip()]
    return [name for name in names if f"moe::{isa}::" not in name and not BUILTIN.fullmatch(name)]


needs_nm = pytest.mark.skipif(
    shutil.which("nm") is None or sys.platform == "darwin", reason="needs nm of binutils"
)


@needs_compiler
@needs_nm
def test_shared_symbols_are_found(tree):
    (tree / "csrc" / "cpu" / "inline.cpp").write_text(
        "namespace moe { inline int next(int x) { return x + 1; } }\n"
        "namespace moe::MOE_ISA { auto address() { return &next; } }\n"
    )
    build(tree)
    folder = tree / build_steps.build_folder("cpu") / "baseline"
    assert shared_symbols(folder / "kernel.o", "baseline") == []
    assert shared_symbols(folder / "kernel.o", "avx2") == ["moe::baseline::name()"]
    assert shared_symbols(folder / "inline.o", "baseline") == ["moe::next(int)"]


@needs_nm
@pytest.mark.parametrize("isa", build_cpu.isas())
def test_kernels_share_no_code_between_isas(isa):
    objects = sorted((ROOT / build_steps.build_folder("cpu") / isa).glob("*.o"))
    if not objects:
        pytest.skip("the C++ module was not built in this tree")
    for path in objects:
        assert shared_symbols(path, isa) == [], path
