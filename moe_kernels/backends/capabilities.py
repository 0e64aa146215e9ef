"""What ``python -m moe_kernels.backends`` prints: the op x backend table of this machine."""

from collections.abc import Iterable

import torch

from moe_kernels import backends
from moe_kernels.backends import OPS, Backend, measured, serving

NO_GPU = "runs on cuda only, and PyTorch sees no GPU here"


def explain() -> str:
    """Render the table, the reason for every empty cell, and the measurements that decided."""
    devices = _devices()
    names = [
        str(device) if device.type == name else f"{device} ({name})"
        for name, device in devices.items()
    ]
    lines = [f"torch {torch.__version__}, devices: {', '.join(names)}", ""]
    lines += [*_table(devices), ""]
    for backend in backends.BACKENDS.values():
        lines += _reasons(backend, devices)
    cited = _cited(devices)
    if cited:
        lines += ["", "automatic by measurement:", *(f"  - {words}" for words in cited)]
    return "\n".join(lines)


def _devices() -> dict[str, torch.device]:
    """The CPU, and a GPU of each architecture that is here."""
    found = {"cpu": torch.device("cpu")}
    for index in range(torch.cuda.device_count()):
        arch = measured.architecture("cuda", index)
        if arch is not None:
            found.setdefault(arch, torch.device("cuda", index))
    return found


def _automatic(op: str, devices: dict[str, torch.device]) -> dict[str, str]:
    return {name: serving(op, device, "auto") for name, device in devices.items()}


def _table(devices: dict[str, torch.device]) -> Iterable[str]:
    width = max(map(len, OPS)) + 2
    yield "op".ljust(width) + "".join(name.ljust(12) for name in backends.BACKENDS) + "automatic"
    for op in OPS:
        cells = [
            "yes" if _why_nowhere(backend, op, devices) is None else "-"
            for backend in backends.BACKENDS.values()
        ]
        chosen = ", ".join(f"{name}: {serves}" for name, serves in _automatic(op, devices).items())
        yield op.ljust(width) + "".join(cell.ljust(12) for cell in cells) + chosen


def _reasons(backend: Backend, devices: dict[str, torch.device]) -> Iterable[str]:
    """The backend, and why it does not serve some ops."""
    missing: dict[str, list[str]] = {}
    for op in OPS:
        reason = _why_nowhere(backend, op, devices)
        if reason is not None:
            missing.setdefault(reason, []).append(op)
    described = backend.describe()
    yield f"{backend.name}: {backend.summary}{f' ({described})' if described else ''}"
    for reason, ops in missing.items():
        which = "every op" if len(ops) == len(OPS) else ", ".join(ops)
        yield f"  - {which}: {reason}"


def _why_nowhere(backend: Backend, op: str, devices: dict[str, torch.device]) -> str | None:
    """Why a backend serves an op on none of the devices here; ``None`` when it does on one."""
    types = dict.fromkeys(device.type for device in devices.values())
    reasons = [backend.why_not(op, device_type) for device_type in types]
    if None in reasons:
        return None
    # A missing module is said before a missing GPU: it would be missing on a GPU, too.
    own = backend.record or backend.package
    if own and (reason := backend.why_no_kernel(op)) is not None:
        return reason
    if backend.module is not None and "cuda" in backend.device_types and "cuda" not in types:
        return NO_GPU
    return reasons[-1]


def _cited(devices: dict[str, torch.device]) -> list[str]:
    """The entries of the table of measurements that decide here."""
    chosen = {(op, name): serves for op in OPS for name, serves in _automatic(op, devices).items()}
    entries = [backends.MEASURED[key] for key in chosen if key in backends.MEASURED]
    return [entry.words() for entry in entries if chosen[entry.op, entry.arch] == entry.backend]
