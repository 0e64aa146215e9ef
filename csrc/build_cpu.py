"""How ``moe_kernels._cpu`` is compiled.

Each file of ``cpu/`` is compiled once for every instruction set (ISA), each time with the name of
its ISA in ``MOE_ISA``, and the module picks one when it is imported. So one build runs on every
processor of its architecture, and nothing is tuned to the machine that compiled it.
"""

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from build_steps import (
    Step,
    binding_flags,
    build_folder,
    checks,
    module_file,
    run_steps,
    shared_flags,
    warnings_are_errors,
)
from build_tools import BuildError, Compiler, find_compiler, sanitizers

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


def build(root: Path, environ: Mapping[str, str], record: dict[str, Any]) -> Path:
    """Build the module and write into ``record`` what it is; return its path."""
    compiler, sanitize = find_compiler(environ), sanitizers(environ)
    record["compiler"] = compiler.name
    steps = compile_steps(root, compiler, sanitize, environ)
    module = run_steps(steps, root, environ, "MOE_KERNELS_BUILD=cpu")
    record |= {"isas": list(isas()), "sanitize": ",".join(sanitize)}
    return module


def compile_steps(
    root: Path, compiler: Compiler, sanitize: Sequence[str], environ: Mapping[str, str]
) -> list[Step]:
    """List every call of the compiler; the last one links."""
    if not (root / "csrc" / "bindings.cpp").exists():
        raise BuildError("csrc/bindings.cpp is missing; install from a complete source tree")
    folder = build_folder("cpu", sanitize)
    optimise = ["-O1", "-g", "-fno-omit-frame-pointer"] if sanitize else ["-O3", "-g0"]
    user = shlex.split(environ.get("CXXFLAGS", ""))
    flags = [*COMMON_FLAGS, *optimise, *checks(sanitize), "-Icsrc"]
    if warnings_are_errors(environ):
        flags.append("-Werror")
    flags += user
    names = isas()

    steps = []

    def compile_one(source: str, output: str, *extra: str) -> None:
        command = (*compiler.command, *flags, *extra, "-c", source, "-o", output)
        steps.append(Step((source,), output, command))

    tables = [f"-DMOE_HAS_{name.upper()}=1" for name in names if name != "baseline"]
    headers = binding_flags()
    for source in sorted((root / "csrc").glob("*.cpp")):
        extra = [*tables, *headers] if source.stem == "bindings" else []
        compile_one(f"csrc/{source.name}", f"{folder}/{source.stem}.o", *extra)
    for source in sorted((root / "csrc" / "cpu").glob("*.cpp")):
        for name in names:
            extra = [f"-DMOE_ISA={name}", f"-DMOE_ISA_{name.upper()}=1", *ISA_FLAGS[name]]
            compile_one(f"csrc/cpu/{source.name}", f"{folder}/{name}/{source.stem}.o", *extra)

    objects = tuple(step.output for step in steps)
    module = module_file(folder, "_cpu")
    link = [*compiler.command, *shared_flags(sanitize), "-fopenmp", *checks(sanitize), *user]
    link += [*objects, "-o", module, *shlex.split(environ.get("LDFLAGS", ""))]
    return [*steps, Step(objects, module, tuple(link))]
