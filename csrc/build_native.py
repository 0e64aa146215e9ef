"""Compile ``csrc/`` into ``moe_kernels/_cpu``; setup.py calls ``build_cpu``. Nothing needs torch.

Each file of ``cpu/`` is compiled once for every instruction set (ISA), each time with the name of
its ISA in ``MOE_ISA``, and the module picks one when it is imported. So one build runs on every
processor of its architecture, and nothing is tuned to the machine that compiled it.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build_tools import (
    BuildError,
    Compiler,
    build_choice,
    find_compiler,
    find_ninja,
    max_jobs,
    sanitizers,
)

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2)
ISA_FLAGS = {
    "baseline": (),
    "avx2": _AVX2,
    # GCC uses half of the register otherwise.
    "avx512": (*_AVX512, "-mprefer-vector-width=512"),
}

COMMON_FLAGS = (
    *("-std=c++17", "-fopenmp", "-fPIC", "-fvisibility=hidden"),
    # Both let loops vectorise and change no result: nobody reads errno or the exception flags.
    *("-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
)


def isas(machine: str | None = None) -> tuple[str, ...]:
    """Instruction sets to compile for on ``machine``, by default what this Python is for."""
    if machine is None:
        machine = platform.machine() if sys.maxsize > 2**32 else "32 bits"
    return tuple(ISA_FLAGS) if machine.lower() in ("x86_64", "amd64") else ("baseline",)


@dataclass(frozen=True)
class Step:
    """One call of the compiler. Paths are relative to the project's root, and so is the call."""

    inputs: tuple[str, ...]
    output: str
    command: tuple[str, ...]


def build_folder(sanitize: Sequence[str]) -> str:
    """Folder of the objects: one for each kind of build, so that changing back compiles nothing."""
    parts = ["cpu", f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}", *sanitize]
    return "build/" + ".".join(parts)


def compile_steps(
    root: Path, compiler: Compiler, sanitize: Sequence[str], environ: Mapping[str, str]
) -> list[Step]:
    """List every call of the compiler; the last one links."""
    if not (root / "csrc" / "bindings.cpp").exists():
        raise BuildError("csrc/bindings.cpp is missing; install from a complete source tree")
    folder = build_folder(sanitize)
    optimise = ["-O1", "-g", "-fno-omit-frame-pointer"] if sanitize else ["-O3", "-g0"]
    checks = [f"-fsanitize={','.join(sanitize)}"] if sanitize else []
    if "undefined" in sanitize:
        checks.append("-fno-sanitize-recover=undefined")
    user = shlex.split(environ.get("CXXFLAGS", ""))
    flags = [*COMMON_FLAGS, *optimise, *checks, "-Icsrc"]
    if environ.get("MOE_KERNELS_WERROR") == "1":
        flags.append("-Werror")
    flags += user
    names = isas()

    steps = []

    def compile_one(source: str, output: str, *extra: str) -> None:
        command = (*compiler.command, *flags, *extra, "-c", source, "-o", output)
        steps.append(Step((source,), output, command))

    tables = [f"-DMOE_HAS_{name.upper()}=1" for name in names if name != "baseline"]
    # System headers stay out of the dependencies: under build isolation pybind11 is in a new
    # folder every time, and only this file sees it.
    headers = [word for path in _binding_headers() for word in ("-isystem", path)]
    for source in sorted((root / "csrc").glob("*.cpp")):
        extra = [*tables, *headers] if source.stem == "bindings" else []
        compile_one(f"csrc/{source.name}", f"{folder}/{source.stem}.o", *extra)
    for source in sorted((root / "csrc" / "cpu").glob("*.cpp")):
        for name in names:
            extra = [f"-DMOE_ISA={name}", f"-DMOE_ISA_{name.upper()}=1", *ISA_FLAGS[name]]
            compile_one(f"csrc/cpu/{source.name}", f"{folder}/{name}/{source.stem}.o", *extra)

    objects = tuple(step.output for step in steps)
    module = f"{folder}/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    # Elsewhere Python's own symbols may stay open in a module; macOS wants to be told.
    shared = ["-shared"]
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
    elif not sanitize:
        shared.append("-s")
    link = [*compiler.command, *shared, "-fopenmp", *checks, *user, *objects, "-o", module]
    link += shlex.split(environ.get("LDFLAGS", ""))
    return [*steps, Step(objects, module, tuple(link))]


def _binding_headers() -> list[str]:
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is not installed; install it, or use pip install") from None
    paths = [pybind11.get_include(), sysconfig.get_path("include")]
    return list(dict.fromkeys([*paths, sysconfig.get_path("platinclude")]))


def ninja_text(steps: Sequence[Step]) -> str:
    """Write the steps as a ninja file, with the headers that the compiler reports."""
    lines = [
        f"builddir = {_escape(str(Path(steps[-1].output).parent))}",
        "rule compile",
        "  command = $words -MMD -MF $out.d",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $words",
        "  description = link $out",
    ]
    for step in steps:
        rule = "link" if step is steps[-1] else "compile"
        inputs = " ".join(map(_escape, step.inputs))
        lines.append(f"build {_escape(step.output)}: {rule} {inputs}")
        lines.append(f"  words = {shlex.join(step.command).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


def _escape(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


def run_steps(steps: Sequence[Step], root: Path, environ: Mapping[str, str]) -> Path:
    """Run the steps, with ninja only those that changed; return the module's path."""
    ninja = find_ninja(environ)
    folder = (root / steps[-1].output).parent
    for step in steps:
        (root / step.output).parent.mkdir(parents=True, exist_ok=True)
    # Objects of sources that are gone would only mislead who looks into the folder.
    for path in set(folder.rglob("*.o")) - {root / step.output for step in steps}:
        path.unlink()
    if ninja is None:
        for step in steps:
            print(f"compile {step.output}", flush=True)
            _run(step.command, root, environ)
    else:
        (folder / "build.ninja").write_text(ninja_text(steps))
        jobs = max_jobs(environ)
        words = [ninja, "-f", str(folder / "build.ninja"), *([f"-j{jobs}"] if jobs else [])]
        _run(words, root, environ)
    return root / steps[-1].output


def _run(command: Sequence[str], folder: Path, environ: Mapping[str, str]) -> None:
    lines = []
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environ, "LC_ALL": "C"},  # "error:" is searched for below
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise BuildError(f"{command[0]} could not be started ({error.strerror})") from None
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            print(line, end="", flush=True)
    if process.returncode:
        said = [line for line in lines if line] or ["no message"]
        why = next((line for line in said if "error:" in line), said[-1])
        raise BuildError(
            f"compiling failed ({why}); to see all of it run pip install -v again "
            "with MOE_KERNELS_BUILD=cpu"
        )


def build_cpu(root: Path, packages: Sequence[Path], environ: Mapping[str, str]) -> None:
    """Build ``_cpu`` as the environment asks, and put it into each of the package folders.

    Each folder also gets ``_build.json``, which says what happened. Where nothing was built, no
    older module stays behind.

    Raises:
        BuildError: for a wrong setting, and for a failed build under ``MOE_KERNELS_BUILD=cpu``.
    """
    choice, sanitize = build_choice(environ), sanitizers(environ)
    max_jobs(environ)
    record = {"built": False, "reason": "", "compiler": "", "isas": [], "sanitize": ""}
    module = failure = None
    try:
        if choice == "none":
            raise BuildError(
                "MOE_KERNELS_BUILD was 'none' when it was installed; "
                "set it to 'auto' and run pip install again"
            )
        compiler = find_compiler(environ)
        record["compiler"] = compiler.name
        steps = compile_steps(root, compiler, sanitize, environ)
        module = run_steps(steps, root, environ)
        record |= {"built": True, "isas": list(isas()), "sanitize": ",".join(sanitize)}
    except BuildError as error:
        failure = error
        record["reason"] = str(error)
    for package in packages:
        package.mkdir(parents=True, exist_ok=True)
        if module is None:
            for old in package.glob("_cpu.*"):
                if old.suffix in (".so", ".pyd"):
                    old.unlink()
        else:
            # A process may have the old module open: put the new one beside it, then swap.
            fresh = package / f"{module.name}.new"
            shutil.copy2(module, fresh)
            os.replace(fresh, package / module.name)
        (package / "_build.json").write_text(json.dumps({"cpu": record}, indent=2) + "\n")
    if failure is None:
        print(f"moe_kernels._cpu: built by {record['compiler']} for {', '.join(isas())}")
    elif choice == "cpu":
        raise failure
    else:
        print(f"moe_kernels._cpu: not built, because {failure}")
