"""The one place that decides which backend serves an op.

A backend is a table from op name to function, plus the reason why a cell is empty. ``resolve``
picks one per op and device: an explicit request that cannot be met raises with the reason; the
automatic choice takes what was measured to be fastest on this kind of GPU, else the first of the
table that serves the op, and says so once when it had to pass one over. ``python -m
moe_kernels.backends`` prints the whole table.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from moe_kernels.backends import measured
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
    """A backend, or each of a list, was asked for by name and cannot serve the op here."""


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
        record: its name in the build's record, when it is built with the package.
        package: an optional package that it calls; its module says how to install that.
    """

    name: str
    summary: str
    device_types: tuple[str, ...]
    module: str | None = None
    reason: str = ""
    on_request: tuple[str, ...] = ()
    record: str = ""
    package: str = ""

    def why_not(self, op: str, device_type: str) -> str | None:
        """Say why this backend cannot serve ``op`` on ``device_type``; ``None`` when it can."""
        if self.module is None:
            return self.reason
        if self.device_types and device_type not in self.device_types + self.on_request:
            return f"runs on {' and '.join(self.device_types)} only, not on {device_type}"
        return self.why_no_kernel(op)

    def why_no_kernel(self, op: str) -> str | None:
        """Say why there is no function for ``op``, whatever the device; ``None`` when there is."""
        if self.name in _broken:
            return _broken[self.name]
        try:
            implementations = self.implementations()
        except ImportError as error:
            _broken[self.name] = self._why_missing(error)
            return _broken[self.name]
        return None if op in implementations else "has no kernel for it"

    def implementations(self) -> dict[str, Callable[..., Any]]:
        """Functions of this backend by op name."""
        assert self.module is not None
        found = _loaded.setdefault(self.name, {})
        if not found:
            found |= importlib.import_module(self.module).IMPLEMENTATIONS
        return found

    def describe(self) -> str:
        """What the backend says about itself once it is loaded; often nothing."""
        if self.module is None or not _loaded.get(self.name):
            return ""
        describe = getattr(importlib.import_module(self.module), "describe", str)
        return str(describe())

    def _why_missing(self, error: ImportError) -> str:
        if self.package:
            return f"cannot run: {error}"
        if not self.record:
            return f"cannot be imported ({error})"
        if build_record().get(self.record, {}).get("built"):
            return f"was built but cannot be loaded ({error}); install again with pip"
        return why_not_built(self.record)


# Plain dictionaries, so that torch.compile can read them without tracing an import. It sees each as
# it was when first read: therefore one for each backend, read only after that was loaded.
_loaded: dict[str, dict[str, Callable[..., Any]]] = {}
_resolved: dict[tuple[str, torch.device, str | None], Callable[..., Any]] = {}
_broken: dict[str, str] = {}  # backends whose import failed, and why

_SIMULATED = os.environ.get("MOE_KERNELS_SIMULATED_GPU") == "1"
# The automatic choice takes the first that serves the op on the device, unless a measurement says
# otherwise. Triton stands before CUDA because it serves every op.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "triton",
            "Triton kernels; on a CPU under TRITON_INTERPRET=1, for tests",
            ("cuda",),
            module="moe_kernels.backends.triton",
            on_request=("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else (),
        ),
        Backend(
            "cuda",
            "CUDA C++ kernels of routing and rows; MOE_KERNELS_SIMULATED_GPU=1 simulates a GPU",
            ("cpu",) if _SIMULATED else ("cuda",),
            module="moe_kernels.backends.cuda",
            on_request=("cpu",) if _SIMULATED else (),
            record="simulated" if _SIMULATED else "cuda",
        ),
        Backend(
            "cpu",
            "C++ kernels with OpenMP",
            ("cpu",),
            module="moe_kernels.backends.cpu",
            record="cpu",
        ),
        Backend(
            "megablocks",
            "grouped products of megablocks, bf16 token choice; on request only",
            ("cuda",),
            module="moe_kernels.backends.megablocks",
            on_request=("cuda",),
            package="grouped_gemm",
        ),
        Backend(
            "reference",
            "plain PyTorch, the specification",
            (),
            module="moe_kernels.backends.reference",
        ),
    )
}
_loaded |= {name: {} for name in BACKENDS}
MEASURED = measured.read(measured.TABLE, OPS, BACKENDS)


class _Default:
    """The process-wide request of ``use_backend``; ``None`` is the automatic choice."""

    name: str | None = None


def check_backend(names: str | None, origin: str = "backend") -> str | None:
    """The names of a request without blanks, ``None`` for the automatic choice."""
    if names in (None, "auto"):
        return None
    listed = [name.strip() for name in names.split(",")]
    if any(name not in BACKENDS for name in listed):
        raise ValueError(
            f"{origin} is {names!r}; expected 'auto', {', '.join(map(repr, BACKENDS))}, or some "
            "of these backends in order of preference: 'cuda,triton'."
        )
    return ",".join(listed)


_Default.name = check_backend(os.environ.get("MOE_KERNELS_BACKEND"), "MOE_KERNELS_BACKEND")


class use_backend:
    """Ask for a backend everywhere, for good or inside a ``with`` block.

    Args:
        name: a backend of ``python -m moe_kernels.backends``, or several with commas: each op is
            served by the first of them that can serve it (``"cuda,triton"``). ``"auto"`` or
            ``None`` returns to the automatic choice.

    Raises:
        ValueError: for an unknown name. Whether one of the backends can serve an op is checked
            when the op is called, and raises ``BackendUnavailable`` with the reasons.
    """

    def __init__(self, name: str | None) -> None:
        self._previous = _Default.name
        _Default.name = check_backend(name)

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
        device: of the tensors.
        backend: an explicit request, one name or several with commas; ``None`` means the
            ``use_backend`` default, else automatic.

    Raises:
        ValueError: for an unknown backend name.
        BackendUnavailable: when an explicit request cannot be met, with the reason.
    """
    requested = _Default.name if backend is None else backend
    if torch.compiler.is_compiling():
        return _loaded[_choose(op, device.type, device.index, requested)][op]
    key = (op, device, requested)
    if key not in _resolved:
        _resolved[key] = _loaded[_choose(op, device.type, device.index, requested)][op]
    return _resolved[key]


def serving(op: str, device: torch.device, backend: str | None = None) -> str:
    """Name of the backend that ``resolve`` would choose."""
    requested = _Default.name if backend is None else backend
    return _choose(op, device.type, device.index, requested)


# A device is given as type and index: constants that torch.compile can hand to this function.
@torch.compiler.assume_constant_result
def _choose(op: str, device_type: str, index: int | None, requested: str | None) -> str:
    assert op in OPS, op
    requested = check_backend(requested)
    if requested is not None:
        return _first_of(requested.split(","), op, device_type)
    for backend in _in_order(op, measured.architecture(device_type, index)):
        if device_type in backend.on_request:
            continue
        reason = backend.why_not(op, device_type)
        if reason is None:
            return backend.name
        if backend.module is not None and device_type in backend.device_types:
            _log_passed_over(backend.name, op, device_type, reason)
    raise AssertionError("the reference backend serves every op on every device")


def _first_of(names: list[str], op: str, device_type: str) -> str:
    """The first of the requested backends that serves the op."""
    reasons: dict[str, str] = {}
    for name in names:
        reason = BACKENDS[name].why_not(op, device_type)
        if reason is None:
            for passed_over, why in reasons.items():
                _log_passed_over(passed_over, op, device_type, why)
            return name
        reasons[name] = reason
    found = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
    raise BackendUnavailable(
        f"backend {','.join(names)!r} was requested for {op} on {device_type} but "
        f"{found if len(names) > 1 else reasons[names[0]]}. "
        "Use 'auto', or see: python -m moe_kernels.backends"
    )


def _in_order(op: str, arch: str | None) -> Iterable[Backend]:
    """What the automatic choice tries: the backend measured as fastest, then the table's order."""
    if arch is None or (op, arch) not in MEASURED:
        return BACKENDS.values()
    first = BACKENDS[MEASURED[op, arch].backend]
    return [first, *(backend for backend in BACKENDS.values() if backend is not first)]


_logged: set[str] = set()


def _log_passed_over(name: str, op: str, device_type: str, reason: str) -> None:
    message = f"{op} on {device_type}: {name} passed over, because it {reason}"
    if message not in _logged:
        _logged.add(message)
        logger.info(message)
