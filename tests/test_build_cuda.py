"""The build of the CUDA kernels: nvcc and architectures, the simulated GPU, what is kept.

What compiles does so on a tiny tree of its own and for one architecture; see ``build_trees.py``.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import build_cuda
import build_native
import build_simulated
import build_steps
import build_tools
import cuda_tools
import pytest
import run_nvcc
from build_tools import BuildError
from cuda_tools import Nvcc

from .build_trees import (
    CUDA_HEADER,
    CUDA_KERNEL,
    add_cuda,
    environment,
    found,
    make_tree,
    needs_compiler,
    run,
)

NVCC_12_4 = Nvcc(("nvcc",), (12, 4), frozenset({75, 80, 86, 87, 89, 90}))
NVCC_13_0 = Nvcc(
    ("nvcc",), (13, 0), frozenset({75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121})
)
needs_nvcc = pytest.mark.skipif(not found(cuda_tools.find_nvcc), reason="needs nvcc")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a project with all modules, and next to nothing in them."""
    return add_cuda(make_tree(tmp_path))


@pytest.fixture
def no_usual_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide a toolkit that is installed where NVIDIA puts it."""
    monkeypatch.setattr(cuda_tools, "USUAL_FOLDER", tmp_path / "no toolkit")


def build(tree: Path, **settings: str) -> dict:
    settings = {"TORCH_CUDA_ARCH_LIST": "8.0", **settings}
    build_native.build_modules(tree, [tree / "moe_kernels"], environment(**settings))
    return record(tree)


def record(tree: Path) -> dict:
    return json.loads((tree / "moe_kernels" / "_build.json").read_text())


def modules(folder: Path) -> set[str]:
    return {path.name.split(".")[0] for path in (folder / "moe_kernels").glob("_*.so")}


def load(folder: Path, module: str) -> str:
    """Import the module in a fresh process and return the name that its kernels give."""
    result = run(folder, "-c", f"import moe_kernels.{module} as m; print(m.name)")
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def fake_nvcc(folder: Path, release: str = "12.4", codes: str = "sm_80 sm_90") -> str:
    """Put a program that answers like nvcc into ``folder``; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvcc"
    lines = "\\n".join(codes.split())
    path.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *--version) echo "tools, release {release}, V{release}.1";; '
        f"*) printf '{lines}\\n';; esac\n"
    )
    path.chmod(0o755)
    return str(path)


# nvcc


def test_nvcc_is_looked_for_in_order(tmp_path, monkeypatch):
    places = [tmp_path / name for name in ("named", "home/bin", "path/bin", "on_path", "usual")]
    programs = [fake_nvcc(place) for place in places]
    monkeypatch.setattr(cuda_tools, "USUAL_FOLDER", places[4])
    environ = {
        "CUDACXX": f"{programs[0]} -v",
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDA_PATH": str(tmp_path / "path"),
        "PATH": f"{places[3]}{os.pathsep}{os.environ['PATH']}",
    }
    assert cuda_tools.find_nvcc(environ).command == (programs[0], "-v")
    del environ["CUDACXX"]
    assert cuda_tools.find_nvcc(environ).command == (programs[1],)
    del environ["CUDA_HOME"]
    nvcc = cuda_tools.find_nvcc(environ)
    assert nvcc == Nvcc((programs[2],), (12, 4), frozenset({80, 90}))
    assert nvcc.name == "nvcc 12.4"
    environ["CUDA_PATH"] = str(tmp_path / "nothing here")
    assert cuda_tools.find_nvcc(environ).command == (programs[3],)
    environ["PATH"] = "/nonexistent"
    assert cuda_tools.find_nvcc(environ).command == (programs[4],)


def test_missing_and_wrong_nvcc_are_named(tmp_path, no_usual_folder):
    with pytest.raises(BuildError, match=r"tried CUDACXX, CUDA_HOME, CUDA_PATH, .*12\.0 or newer"):
        cuda_tools.find_nvcc({"PATH": ""})
    with pytest.raises(BuildError, match=r"/nowhere/nvcc \(from CUDACXX\) was not found"):
        cuda_tools.find_nvcc({"PATH": "", "CUDACXX": "/nowhere/nvcc"})
    old = fake_nvcc(tmp_path / "old", "11.8")
    with pytest.raises(BuildError, match=r"is nvcc 11\.8; expected 12\.0 or newer"):
        cuda_tools.find_nvcc({"PATH": os.environ["PATH"], "CUDACXX": old})
    other = shutil.which("true")
    with pytest.raises(BuildError, match=r"--version says '.*'; expected an nvcc"):
        cuda_tools.find_nvcc({"PATH": os.environ["PATH"], "CUDACXX": str(other)})


def names(nvcc: Nvcc, **settings: str) -> list[str]:
    return [one.name for one in cuda_tools.architectures(settings, nvcc)]


def test_default_architectures_are_those_that_nvcc_knows():
    assert names(NVCC_13_0) == ["8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX"]
    assert names(NVCC_12_4) == ["8.0", "8.6", "8.9", "9.0a", "9.0+PTX"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("8.0", ["8.0"]),
        (" 9.0a;8.0, 8.6 ;12.0f", ["8.0", "8.6", "9.0a", "12.0f"]),
        ("8.0+PTX 8.0", ["8.0+PTX"]),
        ("Ampere;Hopper", ["8.0", "8.6+PTX", "9.0+PTX"]),
        ("Blackwell", ["10.0", "10.3", "12.0", "12.1+PTX"]),
        ("Ampere+Tegra;Blackwell+Tegra", ["8.7", "11.0"]),
    ],
)
def test_architectures_are_read(asked, expected):
    assert names(NVCC_13_0, TORCH_CUDA_ARCH_LIST=asked) == expected


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("10.0", "holds '10.0'"),
        ("Turing", "holds 'Turing'"),
        ("native", "holds 'native'"),
        ("80", "holds '80'"),
        ("8.6a", "holds '8.6a'"),
        ("9.0f", "holds '9.0f'"),
        ("Blackwell", "holds 'Blackwell', which includes '10.0'"),
    ],
)
def test_impossible_architectures_are_named_and_the_possible_ones(asked, said):
    with pytest.raises(BuildError) as error:
        names(NVCC_12_4, TORCH_CUDA_ARCH_LIST=asked)
    assert said in str(error.value)
    assert "numbers of nvcc 12.4 from 8.0 on (8.0, 8.6, 8.7, 8.9, 9.0;" in str(error.value)


def test_older_architectures_are_left_out(capsys):
    assert names(NVCC_13_0, TORCH_CUDA_ARCH_LIST="5.2 7.5+PTX 8.0 9.0") == ["8.0", "9.0"]
    assert "7.5+PTX is left out, the kernels need 8.0 or newer" in capsys.readouterr().out
    with pytest.raises(BuildError, match=r"'6\.1;7\.5', all below 8\.0"):
        names(NVCC_13_0, TORCH_CUDA_ARCH_LIST="6.1;7.5")


def test_gencode_has_code_and_ptx():
    plain, later = cuda_tools.architectures({"TORCH_CUDA_ARCH_LIST": "9.0a;12.0+PTX"}, NVCC_13_0)
    assert plain.gencode == "arch=compute_90a,code=sm_90a"
    assert later.gencode == "arch=compute_120,code=[sm_120,compute_120]"


# Steps


def test_steps_of_the_cuda_module(tree, monkeypatch):
    monkeypatch.setattr(build_cuda, "binding_flags", lambda: ["headers"])
    compiler = build_tools.Compiler(("ccache", "g++"), "g++ 12")
    targets = cuda_tools.architectures({}, NVCC_12_4)
    settings = {"CXXFLAGS": "-DUSER=1", "LDFLAGS": "-Wl,-O1,-z", "MOE_KERNELS_WERROR": "1"}
    named = settings | {"CXX": "ccache g++"}
    kernel, bindings, link = build_cuda.compile_steps(tree, compiler, NVCC_12_4, targets, named)
    assert kernel.command[:3] == (sys.executable, "csrc/run_nvcc.py", kernel.remarks)
    assert kernel.remarks == kernel.output.removesuffix(".o") + ".ptxas"
    words = " ".join(kernel.command)
    assert "nvcc -ccbin g++ -std=c++17 -O3 -fmad=false" in words
    assert "-Werror all-warnings" in words
    assert words.count("-gencode") == len(targets) == 5
    assert "-DUSER=1" not in words
    assert {"ccache", "headers", "-DUSER=1", "-Werror"} <= set(bindings.command)
    assert "-DMOE_MODULE=_cuda" in bindings.command
    assert link.inputs == (kernel.output, bindings.output)
    assert "-cudart static" in " ".join(link.command)
    assert link.command[-1] == r"-Wl\,-O1\,-z"
    unnamed = build_cuda.compile_steps(tree, compiler, NVCC_12_4, targets, {})
    assert not any("-ccbin" in step.command for step in unnamed)
    assert not any("all-warnings" in step.command for step in unnamed)
    text = build_steps.ninja_text([kernel, bindings, link])
    assert f"build {kernel.output} | {kernel.remarks}: compile csrc/cuda/kernel.cu\n" in text
    assert text.count("  pool = nvcc\n") == 1


def test_steps_of_the_simulated_module(tree, monkeypatch):
    monkeypatch.setattr(build_simulated, "binding_flags", lambda: ["headers"])
    compiler = build_tools.Compiler(("g++",), "g++ 12")
    settings = {"CXXFLAGS": "-DUSER=1", "MOE_KERNELS_WERROR": "1"}
    steps = build_simulated.compile_steps(tree, compiler, (), settings)
    kernel, simulator, bindings, _ = steps
    for step in (kernel, simulator, bindings):
        expected = {"-DMOE_SIMULATED=1", "-ffp-contract=off", "-O2", "-Werror", "-DUSER=1"}
        assert expected <= set(step.command)
    assert kernel.command[-6:-2] == ("-x", "c++", "-c", "csrc/cuda/kernel.cu")
    assert simulator.inputs == ("csrc/cuda/simulator/host.cpp",)
    assert {"-DMOE_MODULE=_cuda_simulated", "headers"} <= set(bindings.command)
    checked = build_simulated.compile_steps(tree, compiler, ("address",), {})
    assert {"-fsanitize=address", "-O1"} <= set(checked[0].command)
    assert {step.output for step in steps}.isdisjoint(step.output for step in checked)


# What ptxas says

REMARKS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5scalePff' for 'sm_80'
ptxas info    : Function properties for _Z5scalePff
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 364 bytes cmem[0]
"""
WARNING = "kernel.cu(3): warning #177-D: variable was declared but never referenced\n"


@pytest.mark.parametrize("status", [0, 2])
def test_remarks_are_kept_and_messages_are_shown(tmp_path, capfd, status):
    kept, said = tmp_path / "kernel.ptxas", tmp_path / "said"
    said.write_text(REMARKS + WARNING)
    kept.write_text("of the last call")
    code = f"import sys; sys.stderr.write(open({str(said)!r}).read()); sys.exit({status})"
    assert run_nvcc.main(kept, [sys.executable, "-c", code]) == status
    assert capfd.readouterr().out == WARNING
    assert kept.exists() == (status == 0)
    assert status or kept.read_text() == REMARKS


def test_nvcc_gets_its_share_of_the_processors(tmp_path, monkeypatch, capfd):
    code = "import sys; print(*sys.argv[1:])"
    for jobs, expected in (("1", "1"), ("2", "1"), ("8", "4")):
        monkeypatch.setenv("MAX_JOBS", jobs)
        assert run_nvcc.main(tmp_path / "kept", [sys.executable, "-c", code, "x.cu"]) == 0
        assert capfd.readouterr().out.split() == ["x.cu", "--threads", expected]
    monkeypatch.delenv("MAX_JOBS")
    assert run_nvcc.threads() >= 1


# Which modules are built


def test_without_nvcc_the_reason_is_recorded(tree, capsys):
    old = tree / "moe_kernels" / "_cuda.cpython-311-x86_64-linux-gnu.so"
    old.touch()
    settings = {"CXX": "/nonexistent", "CUDACXX": "/nowhere/nvcc"}
    entry = build(tree, **settings)["cuda"]
    assert not entry["built"]
    assert "/nowhere/nvcc (from CUDACXX) was not found" in entry["reason"]
    assert f"moe_kernels._cuda: not built, because {entry['reason']}\n" in capsys.readouterr().out
    assert not old.exists()


def test_what_is_not_asked_for_is_not_tried(tree, monkeypatch):
    for name, (module, _) in build_native.MODULES.items():
        monkeypatch.setitem(build_native.MODULES, name, (module, pytest.fail))
        (tree / "moe_kernels" / f"{module}.old.so").touch()
    entries = build(tree, MOE_KERNELS_BUILD="none", MOE_KERNELS_SIMULATED="1")
    assert set(entries) == {"cpu", "cuda", "simulated"}
    for entry in entries.values():
        assert not entry["built"]
        assert "MOE_KERNELS_BUILD was 'none'" in entry["reason"]
    assert modules(tree) == set()

    def builds(root, environ, record):
        path = root / "_cpu.new.so"
        path.touch()
        return path

    monkeypatch.setitem(build_native.MODULES, "cpu", ("_cpu", builds))
    entries = build(tree, MOE_KERNELS_BUILD="cpu")
    assert entries["cpu"]["built"]
    assert "MOE_KERNELS_BUILD was 'cpu'" in entries["cuda"]["reason"]
    assert "set MOE_KERNELS_SIMULATED to 1" in entries["simulated"]["reason"]
    assert modules(tree) == {"_cpu"}


@needs_compiler
def test_a_missing_nvcc_is_an_error_when_cuda_is_asked_for(tree):
    settings = {"MOE_KERNELS_BUILD": "cuda", "CUDACXX": "/nowhere/nvcc"}
    with pytest.raises(BuildError, match="/nowhere/nvcc"):
        build(tree, **settings)
    assert record(tree)["cpu"]["built"]
    assert modules(tree) == {"_cpu"}


@needs_compiler
def test_simulated_module_needs_no_nvcc_and_no_user_gets_it(tree):
    settings = {"MOE_KERNELS_SIMULATED": "1", "CUDACXX": "/nowhere/nvcc"}
    entries = build(tree, **settings)
    assert entries["simulated"]["built"], entries
    assert entries["simulated"]["compiler"] == entries["cpu"]["compiler"]
    assert modules(tree) == {"_cpu", "_cuda_simulated"}
    assert load(tree, "_cuda_simulated") == "simulated"

    result = run(tree, "setup.py", "-q", "bdist_wheel", **settings)
    assert result.returncode == 0, result.stderr
    result = run(tree, "setup.py", "-q", "bdist_wheel", CUDACXX="/nowhere/nvcc")
    assert result.returncode == 0, result.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        packed = {name.split("/")[1].split(".")[0] for name in file.namelist() if ".so" in name}
    assert packed == {"_cpu"}


@needs_compiler
def test_a_failing_simulator_leaves_the_other_modules(tree):
    (tree / "csrc" / "cuda" / "simulator" / "host.cpp").write_text("#error no simulator today\n")
    settings = {"MOE_KERNELS_SIMULATED": "1", "CUDACXX": "/nowhere/nvcc"}
    entries = build(tree, **settings)
    assert "host.cpp:1:2: error: #error no simulator today" in entries["simulated"]["reason"]
    assert modules(tree) == {"_cpu"}
    with pytest.raises(BuildError, match="no simulator today"):
        build(tree, MOE_KERNELS_BUILD="cpu", **settings)


# Real builds with nvcc


@needs_compiler
@needs_nvcc
def test_builds_keeps_remarks_and_sees_changed_headers(tree):
    if not found(build_tools.find_ninja):
        pytest.skip("needs ninja")
    entry = build(tree, MOE_KERNELS_BUILD="cuda", MOE_KERNELS_WERROR="1")["cuda"]
    assert entry["built"], entry
    assert entry["compiler"].startswith("nvcc ")
    assert entry["archs"] == ["8.0"]
    assert entry["reason"] == entry["sanitize"] == ""
    assert load(tree, "_cuda") == "GPU"
    kept = tree / build_steps.build_folder("cuda") / "kernel.ptxas"
    assert "Compiling entry function '_Z5scalePff' for 'sm_80'" in kept.read_text()

    before = kept.stat().st_mtime_ns
    build(tree, MOE_KERNELS_BUILD="cuda", MOE_KERNELS_WERROR="1")
    assert kept.stat().st_mtime_ns == before
    header = tree / "csrc" / "cuda" / "text.hpp"
    header.write_text(CUDA_HEADER.replace("GPU", "another"))
    os.utime(header, (header.stat().st_mtime + 10,) * 2)  # a clock with coarse ticks
    build(tree, MOE_KERNELS_BUILD="cuda", MOE_KERNELS_WERROR="1")
    assert load(tree, "_cuda") == "another"

    stale = kept.with_name("gone.ptxas")
    stale.touch()
    kept.unlink()
    build(tree, MOE_KERNELS_BUILD="cuda", MOE_KERNELS_WERROR="1")
    assert kept.exists()
    assert not stale.exists()


@needs_compiler
@needs_nvcc
def test_builds_without_ninja_and_shares_no_symbol(tree, monkeypatch, capfd):
    monkeypatch.setattr(build_steps, "find_ninja", lambda environ: None)
    assert build(tree)["cuda"]["built"]
    assert "ptxas info" not in capfd.readouterr().out
    assert load(tree, "_cuda") == "GPU"
    if shutil.which("nm") is None:
        return
    # PyTorch has a CUDA runtime of its own: this one must not get mixed up with it.
    (module,) = (tree / "moe_kernels").glob("_cuda.*.so")
    result = subprocess.run(
        ["nm", "-D", "--defined-only", str(module)], capture_output=True, text=True, check=True
    )
    assert [line.split()[-1] for line in result.stdout.splitlines()] == ["PyInit__cuda"]


@needs_compiler
@needs_nvcc
def test_cuda_error_is_recorded_and_leaves_the_other_module(tree, capfd):
    source = tree / "csrc" / "cuda" / "kernel.cu"
    source.write_text(CUDA_KERNEL.replace("x[threadIdx.x] *= factor;", "x[threadIdx.x] *= facto;"))
    entries = build(tree)
    assert 'error: identifier "facto" is undefined' in entries["cuda"]["reason"]
    assert "again with MOE_KERNELS_BUILD=cuda" in entries["cuda"]["reason"]
    assert 'identifier "facto" is undefined' in capfd.readouterr().out
    assert modules(tree) == {"_cpu"}
    source.write_text(CUDA_KERNEL.replace("*= factor;", "*= factor; int unused = 0;"))
    with pytest.raises(BuildError, match=r'error.*"unused" was declared but never referenced'):
        build(tree, MOE_KERNELS_BUILD="cuda", MOE_KERNELS_WERROR="1")
    assert modules(tree) == {"_cpu"}
    assert build(tree)["cuda"]["built"]
    assert '"unused" was declared but never referenced' in capfd.readouterr().out
