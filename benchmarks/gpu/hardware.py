"""Which GPU it is and how it runs: name, driver, cache, clocks, power."""

import re
import subprocess
from typing import Any

import torch

QUERY = {
    "sm_mhz": "clocks.current.sm",
    "memory_mhz": "clocks.current.memory",
    "watts": "power.draw",
    "celsius": "temperature.gpu",
}
STATIC_QUERY = {
    "driver": "driver_version",
    "max_sm_mhz": "clocks.max.sm",
    "max_memory_mhz": "clocks.max.memory",
    "power_limit_watts": "power.limit",
}


def slug(name: str) -> str:
    """A device's name in a file name: ``NVIDIA H100 80GB HBM3`` is ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge the figures of this GPU; nothing that cannot be read."""
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    return found | query(device, STATIC_QUERY) | {"before": query(device, QUERY)}


def query(device: torch.device, names: dict[str, str]) -> dict[str, float | str]:
    """Current values by nvidia-smi; empty where it is missing or does not know the device."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = ["--id", f"GPU-{uuid}"] if uuid is not None else ["--id", str(device.index or 0)]
    command = ["nvidia-smi", *which, "--format=csv,noheader,nounits"]
    command.append(f"--query-gpu={','.join(names.values())}")
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse(result.stdout, names)


def parse(text: str, names: dict[str, str]) -> dict[str, float | str]:
    """Values of the first line of nvidia-smi's table; what is not available is left out."""
    values = (text.splitlines() or [""])[0].split(", ")
    if len(values) != len(names):
        return {}
    found: dict[str, float | str] = {}
    for name, value in zip(names, values, strict=True):
        if "[" in value:  # [N/A], [Not Supported]
            continue
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = value.strip()
        if name == "driver":
            found[name] = value.strip()
    return found


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
