"""The calls of compilers that make a module, and running them, with ninja where it is there."""

import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build_tools import BuildError, find_ninja, max_jobs
from run_nvcc import NVCC_AT_ONCE

# "x.cpp:1:2: error: ...", and of nvcc "x.cu(1): error #20: ..." and "nvcc fatal   : ...".
_ERROR = re.compile(r"\b(error|fatal)( #\S+)?\s*:")


class _StepError(Exception):
    """A compiler failed; the text is its first error."""


@dataclass(frozen=True)
class Step:
    """One call of a compiler. Paths are relative to the project's root, and so is the call.

    Attributes:
        inputs: files that it reads, without the headers.
        output: the file that it makes.
        command: the words of the call.
        remarks: of a call of nvcc, the file with what it says of the kernels.
    """

    inputs: tuple[str, ...]
    output: str
    command: tuple[str, ...]
    remarks: str = ""


def build_folder(kind: str, sanitize: Sequence[str] = ()) -> str:
    """Folder of the objects: one for each kind of build, so that changing back compiles nothing."""
    parts = [kind, f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}", *sanitize]
    return "build/" + ".".join(parts)


def module_file(folder: str, module: str) -> str:
    """Path of the finished module."""
    return f"{folder}/{module}{sysconfig.get_config_var('EXT_SUFFIX')}"


def checks(sanitize: Sequence[str]) -> list[str]:
    """Flags of the sanitizers, for compiling and for linking."""
    flags = [f"-fsanitize={','.join(sanitize)}"] if sanitize else []
    if "undefined" in sanitize:
        flags.append("-fno-sanitize-recover=undefined")
    return flags


def warnings_are_errors(environ: Mapping[str, str]) -> bool:
    """Read ``MOE_KERNELS_WERROR``."""
    return environ.get("MOE_KERNELS_WERROR") == "1"


def shared_flags(sanitize: Sequence[str]) -> list[str]:
    """Flags that make the C++ compiler link a module."""
    # Elsewhere Python's own symbols may stay open in a module; macOS wants to be told.
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup"]
    return ["-shared"] if sanitize else ["-shared", "-s"]


def binding_flags() -> list[str]:
    """Flags that find the headers of pybind11 and of Python."""
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is not installed; install it, or use pip install") from None
    paths = [pybind11.get_include(), sysconfig.get_path("include")]
    paths = list(dict.fromkeys([*paths, sysconfig.get_path("platinclude")]))
    # System headers stay out of the dependencies: under build isolation pybind11 is in a new
    # folder every time.
    return [word for path in paths for word in ("-isystem", path)]


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
        # Of nvcc, which compiles for several architectures at once; see run_nvcc.py.
        "pool nvcc",
        f"  depth = {NVCC_AT_ONCE}",
    ]
    for step in steps:
        rule = "link" if step is steps[-1] else "compile"
        inputs = " ".join(map(_escape, step.inputs))
        outputs = _escape(step.output) + (f" | {_escape(step.remarks)}" if step.remarks else "")
        lines.append(f"build {outputs}: {rule} {inputs}")
        if step.remarks:
            lines.append("  pool = nvcc")
        lines.append(f"  words = {shlex.join(step.command).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


def _escape(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


def run_steps(steps: Sequence[Step], root: Path, environ: Mapping[str, str], again: str) -> Path:
    """Run the steps, with ninja only those that changed.

    Args:
        steps: calls of compilers; the last one makes the module.
        root: the project's folder.
        environ: for the compilers and ninja.
        again: settings under which a failure ends the installation and shows everything.

    Returns:
        The module's path.

    Raises:
        BuildError: with the first error that a compiler gave.
    """
    ninja = find_ninja(environ)
    folder = (root / steps[-1].output).parent
    for step in steps:
        (root / step.output).parent.mkdir(parents=True, exist_ok=True)
    # Files of sources that are gone would only mislead who looks into the folder.
    made = {root / path for step in steps for path in (step.output, step.remarks) if path}
    for path in {*folder.rglob("*.o"), *folder.rglob("*.ptxas")} - made:
        path.unlink()
    try:
        if ninja is None:
            for step in steps:
                print(f"compile {step.output}", flush=True)
                _run(step.command, root, environ)
        else:
            (folder / "build.ninja").write_text(ninja_text(steps))
            jobs = max_jobs(environ)
            words = [ninja, "-f", str(folder / "build.ninja"), *([f"-j{jobs}"] if jobs else [])]
            _run(words, root, environ)
    except _StepError as error:
        raise BuildError(
            f"compiling failed ({error}); to see all of it run pip install -v again with {again}"
        ) from None
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
        why = next((line for line in said if _ERROR.search(line)), said[-1])
        raise _StepError(why)
