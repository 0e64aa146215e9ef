"""Programs that the build and the driver bring along: compilers, nvidia-smi."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")
USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")
SECONDS = 10.0  # a program that takes longer to say its version is stuck


def run(*command: str) -> tuple[str, str]:
    """What a program prints, and why it printed nothing; one of them is empty."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        return "", f"{command[0]} could not be run ({error})"
    if result.returncode:
        words = (result.stderr or result.stdout).strip().partition("\n")[0]
        return "", f"{command[0]} ended with {result.returncode} ({words})"
    return result.stdout, ""


def cpp_compiler() -> str:
    """The compiler that ``pip install`` would take for the C++ kernels, or why there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [[name] for name in COMPILERS]
    for command in candidates:
        if shutil.which(command[0]):
            said, why_not = run(*command, "--version")
            return f"{said.partition(chr(10))[0]} ({command[0]})" if said else why_not
    if named:
        return f"none: {named[0]}, from CXX, was not found"
    return f"none: tried {', '.join(COMPILERS)}"


def nvcc() -> str:
    """The CUDA compiler that ``pip install`` would take, or why there is none."""
    named = shlex.split(os.environ.get("CUDACXX", ""))
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(str(Path(home) / "bin" / "nvcc") for home in homes), "nvcc", str(USUAL_NVCC)]
    candidates = [named] if named else [[place] for place in places]
    for command in candidates:
        if shutil.which(command[0]):
            said, why_not = run(*command, "--version")
            version = re.search(r"release ([\d.]+)", said)
            if why_not or version is None:
                return why_not or f"{command[0]} --version names no release"
            return f"{version[1]} ({shutil.which(command[0])})"
    if named:
        return f"none: {named[0]}, from CUDACXX, was not found"
    return f"none: tried CUDACXX, CUDA_HOME, CUDA_PATH, PATH, {USUAL_NVCC}"


def nvidia_driver() -> tuple[str, list[str]]:
    """Version of the NVIDIA driver, or why there is none; and the GPUs that it sees."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none: nvidia-smi was not found", []
    said, why_not = run(program, "--query-gpu=driver_version,name", "--format=csv,noheader")
    rows = [line.split(", ", 1) for line in said.splitlines() if ", " in line]
    if not rows:
        return f"none: {why_not or 'nvidia-smi sees no GPU'}", []
    return rows[0][0], [name for _, name in rows]
