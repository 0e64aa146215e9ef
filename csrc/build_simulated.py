"""How ``moe_kernels._cuda_simulated`` is compiled: the CUDA kernels for a GPU that C++ plays.

It is for tests without a GPU and no part of what users install. Nothing of CUDA is needed.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from build_cuda import require_sources
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
from build_tools import Compiler, find_compiler, sanitizers

COMMON_FLAGS = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # As nvcc's -fmad=false: no product and sum in one instruction.
    "-ffp-contract=off",
    "-DMOE_SIMULATED=1",
)


def build(root: Path, environ: Mapping[str, str], record: dict[str, Any]) -> Path:
    """Build the module and write into ``record`` what it is; return its path."""
    compiler, sanitize = find_compiler(environ), sanitizers(environ)
    record["compiler"] = compiler.name
    steps = compile_steps(root, compiler, sanitize, environ)
    module = run_steps(steps, root, environ, "MOE_KERNELS_BUILD=cpu MOE_KERNELS_SIMULATED=1")
    record["sanitize"] = ",".join(sanitize)
    return module


def compile_steps(
    root: Path, compiler: Compiler, sanitize: Sequence[str], environ: Mapping[str, str]
) -> list[Step]:
    """List every call of the compiler; the last one links."""
    require_sources(root)
    folder = build_folder("simulated", sanitize)
    optimise = ["-O1", "-g", "-fno-omit-frame-pointer"] if sanitize else ["-O2", "-g0"]
    user = shlex.split(environ.get("CXXFLAGS", ""))
    flags = [*COMMON_FLAGS, *optimise, *checks(sanitize), "-Icsrc"]
    if warnings_are_errors(environ):
        flags.append("-Werror")
    flags += user

    steps = []

    def compile_one(source: Path, output: str, *extra: str) -> None:
        name = source.relative_to(root).as_posix()
        command = (*compiler.command, *flags, *extra, "-c", name, "-o", f"{folder}/{output}")
        steps.append(Step((name,), f"{folder}/{output}", command))

    sources = root / "csrc" / "cuda"
    for source in sorted(sources.glob("*.cu")):
        compile_one(source, f"{source.stem}.o", "-x", "c++")
    for source in sorted((sources / "simulator").glob("*.cpp")):
        compile_one(source, f"simulator/{source.stem}.o")
    headers = binding_flags()
    compile_one(sources / "bindings.cpp", "bindings.o", "-DMOE_MODULE=_cuda_simulated", *headers)

    objects = tuple(step.output for step in steps)
    module = module_file(folder, "_cuda_simulated")
    link = [*compiler.command, *shared_flags(sanitize), *checks(sanitize), *user]
    link += [*objects, "-o", module, *shlex.split(environ.get("LDFLAGS", ""))]
    return [*steps, Step(objects, module, tuple(link))]
