"""The one place that decides which backend serves an op.

A backend is a table from op name to function, plus the reason why a cell is empty. ``resolve``
picks one per op and device: an explicit request that cannot be met raises with the reason, an
automatic choice takes the fastest backend that serves the op and says so once when it had to
pass over a faster one. ``python -m moe_kernels.backends`` prints the whole table.
"""

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from moe_kernels.build_info import build_record, why_not_built

logger = logging.getLogger("moe_kernels")

OPS = (
    "expert_choice",
    "token_choice",
    "router_probs",
    "dispatch",
    "grouped_gemm",
    "expert_mlp",
    "activation",
    "combine",
    "load_balance_loss",
    "router_z_loss",
    "router_similarity_loss",
)


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot serve the op here."""


@dataclass(frozen=True)
class Backend:
    """One row of the capability table.

    Attributes:
        name: what the user writes.
        summary: one line for the table.
        device_types: where it runs.
        module: module that holds ``IMPLEMENTATIONS`` (op name -> function), imported when first
            used; ``None`` while this version has no kernels for it.
        reason: why ``module`` is ``None``.
        on_request: further device types, served when the backend is asked for by name only.
    """

    name: str
    summary: str
    device_types: tuple[str, ...]
    module: str | None = None
    reason: str = ""
    on_request: tuple[str, ...] = ()

    def why_not(self, op: str, device_type: str) -> str | None:
        """Say why this backend cannot serve ``op`` on ``device_type``; ``None`` when it can."""
        if self.module is None:
            return self.reason
        if self.name in _broken:
            return _broken[self.name]
        if self.device_types and device_type not in self.device_types + self.on_request:
            return f"runs on {' and '.join(self.device_types)} only, not on {device_type}"
        try:
            implementations = self.implementations()
        except ImportError as error:
            _broken[self.name] = _why_missing(self.name, error)
            return _broken[self.name]
        return None if op in implementations else f"has no kernel for {op}"

    def implementations(self) -> dict[str, Callable[..., Any]]:
        """Functions of this backend by op name."""
        assert self.module is not None
        if self.name not in _loaded:
            _loaded[self.name] = importlib.import_module(self.module).IMPLEMENTATIONS
        return _loaded[self.name]


# A plain dictionary, so that torch.compile can read it without tracing the import.
_loaded: dict[str, dict[str, Callable[..., Any]]] = {}
_resolved: dict[tuple[str, str, str | None], Callable[..., Any]] = {}
_broken: dict[str, str] = {}  # backends whose import failed, and why
_COMPILED = ("cpu", "cuda")  # built with the package; build_record() says how that went


def _why_missing(name: str, error: ImportError) -> str:
    if name not in _COMPILED:
        return f"cannot be imported ({error})"
    record = build_record().get(name, {})
    if record.get("built"):
        return f"was built but cannot be loaded ({error}); install again with pip"
    return why_not_built(name)


# Fastest first: the automatic choice takes the first that serves the op on the device.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cuda", "CUDA C++ kernels", ("cuda",), reason="not in this version"),
        Backend(
            "triton",
            "Triton kernels; on a CPU under TRITON_INTERPRET=1, for tests",
            ("cuda",),
            module="moe_kernels.backends.triton",
            on_request=("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else (),
        ),
        Backend("cpu", "C++ kernels with OpenMP", ("cpu",), module="moe_kernels.backends.cpu"),
        Backend(
            "megablocks", "megablocks, when installed", ("cuda",), reason="not in this version"
        ),
        Backend(
            "reference",
            "plain PyTorch, the specification",
            (),
            module="moe_kernels.backends.reference",
        ),
    )
}


class _Default:
    """The process-wide request of ``use_backend``; ``None`` is the automatic choice."""

    name: str | None = None


def _check_name(name: str | None, origin: str) -> str | None:
    if name in (None, "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(
            f"{origin} is {name!r}; expected 'auto', {', '.join(map(repr, BACKENDS))}."
        )
    return name


_Default.name = _check_name(os.environ.get("MOE_KERNELS_BACKEND"), "MOE_KERNELS_BACKEND")


class use_backend:
    """Ask for one backend everywhere, for good or inside a ``with`` block.

    Args:
        name: a backend of ``python -m moe_kernels.backends``; ``"auto"`` or ``None`` returns to
            the automatic choice.

    Raises:
        ValueError: for an unknown name. Whether the backend can serve an op is checked when the
            op is called, and raises ``BackendUnavailable`` with the reason.
    """

    def __init__(self, name: str | None) -> None:
        self._previous = _Default.name
        _Default.name = _check_name(name, "backend")

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _Default.name = self._previous


def resolve(op: str, device: torch.device, backend: str | None = None) -> Callable[..., Any]:
    """Return the function that serves ``op`` on ``device``.

    Args:
        op: one of ``OPS``.
        device: where the tensors are.
        backend: an explicit request; ``None`` means the ``use_backend`` default, else automatic.

    Raises:
        ValueError: for an unknown backend name.
        BackendUnavailable: when an explicit request cannot be met, with the reason.
    """
    requested = _Default.name if backend is None else backend
    if torch.compiler.is_compiling():
        return _loaded[_choose(op, device.type, requested)][op]
    key = (op, device.type, requested)
    if key not in _resolved:
        _resolved[key] = _loaded[_choose(op, device.type, requested)][op]
    return _resolved[key]


def serving(op: str, device: torch.device, backend: str | None = None) -> str:
    """Name of the backend that ``resolve`` would choose."""
    return _choose(op, device.type, _Default.name if backend is None else backend)


@torch.compiler.assume_constant_result
def _choose(op: str, device_type: str, requested: str | None) -> str:
    assert op in OPS, op
    requested = _check_name(requested, "backend")
    if requested is not None:
        reason = BACKENDS[requested].why_not(op, device_type)
        if reason is not None:
            raise BackendUnavailable(
                f"backend {requested!r} was requested for {op} on {device_type} but {reason}. "
                "Use 'auto', or see: python -m moe_kernels.backends"
            )
        return requested
    for name, backend in BACKENDS.items():
        if device_type in backend.on_request:
            continue
        reason = backend.why_not(op, device_type)
        if reason is None:
            return name
        if backend.module is not None and device_type in backend.device_types:
            _log_once(f"{op} on {device_type}: {name} passed over, because it {reason}")
    raise AssertionError("the reference backend serves every op on every device")


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.info(message)


def _details(backend: Backend) -> str:
    """What a loaded backend says about itself."""
    if backend.name not in _loaded or backend.module is None:
        return ""
    describe = getattr(importlib.import_module(backend.module), "describe", None)
    return f" ({describe()})" if describe else ""


def explain() -> str:
    """Render the op x backend table, with the reason for every empty cell."""
    device_types = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = [f"torch {torch.__version__}, devices: {', '.join(device_types)}", ""]
    width = max(map(len, OPS)) + 2
    lines.append("op".ljust(width) + "".join(name.ljust(12) for name in BACKENDS) + "automatic")
    for op in OPS:
        cells = [
            "yes" if any(backend.why_not(op, kind) is None for kind in device_types) else "-"
            for backend in BACKENDS.values()
        ]
        chosen = ", ".join(f"{kind}: {_choose(op, kind, None)}" for kind in device_types)
        lines.append(op.ljust(width) + "".join(cell.ljust(12) for cell in cells) + chosen)
    lines.append("")
    for name, backend in BACKENDS.items():
        missing: dict[str, list[str]] = {}
        for op in OPS:
            reasons = {kind: backend.why_not(op, kind) for kind in device_types}
            if all(reason is not None for reason in reasons.values()):
                missing.setdefault(str(reasons[device_types[-1]]), []).append(op)
        lines.append(f"{name}: {backend.summary}{_details(backend)}")
        for reason, ops in missing.items():
            which = "every op" if len(ops) == len(OPS) else ", ".join(ops)
            lines.append(f"  - {which}: {reason}")
    return "\n".join(lines)
