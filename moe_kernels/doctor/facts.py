"""What is here: versions, compilers, GPUs, the processor, packages, settings."""

import importlib
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import torch

from moe_kernels.build_info import build_record, why_not_built
from moe_kernels.doctor import programs

DISTRIBUTION = "dit-moe-kernels"
PACKAGE = Path(__file__).parent.parent
# Used when they are there and somebody's model needs them.
PEERS = ("diffusers", "transformers", "kernels", "timm", "megablocks", "grouped_gemm")
# The same library under the names of its other builds.
TRITON = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows")
# Every MOE_KERNELS_ variable that something reads; a test holds this to the README's table.
VARIABLES = (
    "MOE_KERNELS_BACKEND",
    "MOE_KERNELS_BUILD",
    "MOE_KERNELS_CACHE",
    "MOE_KERNELS_DISTRIBUTED_DEBUG",
    "MOE_KERNELS_ISA",
    "MOE_KERNELS_KEEP_MB",
    "MOE_KERNELS_PRODUCTS",
    "MOE_KERNELS_SANITIZE",
    "MOE_KERNELS_SIMULATED",
    "MOE_KERNELS_SIMULATED_GPU",
    "MOE_KERNELS_TUNE",
    "MOE_KERNELS_WERROR",
)
# Others' variables that change what runs, and where.
OTHER_VARIABLES = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def machine(driver: str) -> dict[str, str]:
    """One line of text for each fact, in the order in which they are printed.

    Args:
        driver: what ``programs.nvidia_driver`` said.
    """
    return {
        "moe_kernels": f"{_version(DISTRIBUTION)} ({PACKAGE})",
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        "CPU": _processor(),
        "threads": f"{torch.get_num_threads()} of {_cores()} cores",
        "CPU kernels": _instruction_set(),
        "PyTorch": torch.__version__,
        "CUDA runtime": _cuda_runtime(),
        "NVIDIA driver": driver,
        "GPU": _gpus(),
        "Triton": next((f for f in map(_found, TRITON) if f), "none: not installed"),
        "C++ compiler": programs.cpp_compiler(),
        "nvcc": programs.nvcc(),
    }


def extras() -> dict[str, str]:
    """Of every extra of this package: ``"complete"``, or what is missing of it."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
        names = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return {}
    lacking = {
        name: sorted({p for p in _packages(name, requirements) if not _found(p)}) for name in names
    }
    return {name: f"without {', '.join(m)}" if m else "complete" for name, m in lacking.items()}


def _packages(extra: str, requirements: list[str]) -> list[str]:
    """Names of the packages of an extra, and of the extras of this package that it names."""
    found: list[str] = []
    for requirement in requirements:
        words = re.match(r"([\w.-]+)\s*(?:\[([\w.,\s-]+)\])?", requirement)
        marker = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", requirement)
        if words is None or marker is None or marker[1] != extra:
            continue
        if words[1] == DISTRIBUTION:
            for inner in (words[2] or "").split(","):
                found += _packages(inner.strip(), requirements)
        else:
            found.append(words[1])
    return found


def peers() -> dict[str, str]:
    """Version of each optional peer that is installed; nothing is imported."""
    return {name: _found(name) or "not installed" for name in PEERS}


def environment() -> dict[str, str]:
    """The settings that are set."""
    ours = sorted(name for name in os.environ if name.startswith("MOE_KERNELS_"))
    return {name: os.environ[name] for name in (*ours, *OTHER_VARIABLES) if name in os.environ}


def foreign_modules() -> dict[str, str]:
    """Compiled modules that were loaded from elsewhere than this package's folder."""
    loaded = {name: getattr(m, "__file__", None) for name, m in list(sys.modules.items())}
    compiled = {n: path for n, path in loaded.items() if path and n.startswith("moe_kernels._")}
    return {name: path for name, path in compiled.items() if Path(path).parent != PACKAGE}


def _found(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _version(package: str) -> str:
    return _found(package) or "not installed, a source tree"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return f"{name[1]} ({platform.machine()})" if name else platform.machine()


def _cores() -> int:
    # Fewer than the machine has, in a container or under taskset.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _instruction_set() -> str:
    try:
        native = importlib.import_module("moe_kernels._cpu")
    except ImportError as error:
        built = build_record().get("cpu", {}).get("built")
        return f"none: {f'cannot be loaded ({error})' if built else why_not_built('cpu')}"
    usable = ", ".join(native.isas())
    compiler = build_record().get("cpu", {}).get("compiler") or "an unknown compiler"
    return f"{native.isa()} (usable: {usable}; compiled by {compiler})"


def _cuda_runtime() -> str:
    if torch.version.hip:
        return f"none: this PyTorch is built for ROCm {torch.version.hip}"
    return torch.version.cuda or "none: this PyTorch is built without CUDA"


def _gpus() -> str:
    found = []
    for index in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(index)
        except RuntimeError as error:  # a driver that does not answer
            found.append(f"cuda:{index} does not answer ({str(error).splitlines()[0]})")
            continue
        arch = f"sm_{properties.major}{properties.minor}"
        name = getattr(properties, "gcnArchName", arch) if torch.version.hip else arch
        found.append(f"{properties.name} ({name}, {properties.total_memory / 2**30:.0f} GiB)")
    return "; ".join(found) or "none that PyTorch sees"
