"""How ``moe_kernels._cuda`` is compiled: kernels by nvcc, their bindings by the C++ compiler.

Neither a GPU nor its driver is needed. Importing the module needs none either: the CUDA runtime is
linked statically and looks for the driver when the first kernel starts.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from build_steps import (
    Step,
    binding_flags,
    build_folder,
    module_file,
    run_steps,
    warnings_are_errors,
)
from build_tools import BuildError, Compiler, find_compiler
from cuda_tools import Architecture, Nvcc, architectures, find_nvcc

# Routing gives the same bits wherever a function is inlined: without -fmad=false nvcc joins
# products and sums as they happen to meet.
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden")
HOST_FLAGS = ("-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


def build(root: Path, environ: Mapping[str, str], record: dict[str, Any]) -> Path:
    """Build the module and write into ``record`` what it is; return its path."""
    nvcc = find_nvcc(environ)
    record["compiler"] = nvcc.name
    targets = architectures(environ, nvcc)
    steps = compile_steps(root, find_compiler(environ), nvcc, targets, environ)
    module = run_steps(steps, root, environ, "MOE_KERNELS_BUILD=cuda")
    record["archs"] = [target.name for target in targets]
    return module


def compile_steps(
    root: Path,
    compiler: Compiler,
    nvcc: Nvcc,
    targets: Sequence[Architecture],
    environ: Mapping[str, str],
) -> list[Step]:
    """List every call of the compilers; the last one links."""
    require_sources(root)
    folder = build_folder("cuda")
    strict = warnings_are_errors(environ)
    host = ["-ccbin", compiler.program] if environ.get("CXX") else []
    device = [*nvcc.command, *host, *NVCC_FLAGS, "-Icsrc", "-Xptxas", "-v"]
    device += ["-Werror", "all-warnings"] if strict else []
    for target in targets:
        device += ["-gencode", target.gencode]

    steps = []
    for source in sorted((root / "csrc" / "cuda").glob("*.cu")):
        name, output = f"csrc/cuda/{source.name}", f"{folder}/{source.stem}.o"
        remarks = f"{folder}/{source.stem}.ptxas"
        keep = (sys.executable, "csrc/run_nvcc.py", remarks)
        command = (*keep, *device, "-c", name, "-o", output)
        steps.append(Step((name,), output, command, remarks))

    user = shlex.split(environ.get("CXXFLAGS", ""))
    bindings, output = "csrc/cuda/bindings.cpp", f"{folder}/bindings.o"
    plain = [*compiler.command, *HOST_FLAGS, *(["-Werror"] if strict else []), *user]
    plain += ["-DMOE_MODULE=_cuda", "-Icsrc", *binding_flags(), "-c", bindings, "-o", output]
    steps.append(Step((bindings,), output, tuple(plain)))

    objects = tuple(step.output for step in steps)
    module = module_file(folder, "_cuda")
    link = [*nvcc.command, *host, "-shared", "-cudart", "static", "-Xcompiler", "-fPIC"]
    link += ["-Xlinker", "-s", *objects, "-o", module]
    for word in shlex.split(environ.get("LDFLAGS", "")):
        # nvcc hands it on and would cut it at the commas.
        link += ["-Xcompiler", word.replace(",", r"\,")]
    return [*steps, Step(objects, module, tuple(link))]


def require_sources(root: Path) -> None:
    """Raise where the kernels are not part of the tree."""
    if not (root / "csrc" / "cuda" / "bindings.cpp").exists():
        raise BuildError("csrc/cuda/bindings.cpp is missing; install from a complete source tree")
