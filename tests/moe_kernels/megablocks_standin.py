"""What the source of grouped_gemm 0.3 says of its ``gmm``, in plain PyTorch.

Its checks are those of the C++ function; what that leaves unwritten is NaN here.
"""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops.operator import library

# One entry a product: "rows" (row by row), "rows^T" (b transposed) or "weights" (a transposed).
calls: list[str] = []


def gmm(
    a: Tensor,
    b: Tensor,
    batch_sizes: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    """``grouped_gemm.backend.gmm``, on a CPU."""
    assert not (trans_a and trans_b)
    assert batch_sizes.device.type == "cpu"
    assert batch_sizes.dtype == torch.int64
    assert batch_sizes.dim() == 1
    assert a.dim() == 2
    assert b.dim() == (2 if trans_a else 3)
    assert a.shape[0] > 0, "Grouped GEMM execution not possible with HW"
    assert a.dtype == b.dtype == torch.bfloat16
    assert a.is_contiguous()
    assert b.is_contiguous()
    experts = batch_sizes.shape[0]
    if trans_a:
        shape: tuple[int, ...] = (experts, a.shape[1], b.shape[1])
        assert a.shape[0] == b.shape[0]
    else:
        assert b.shape[0] == experts
        assert b.shape[2 if trans_b else 1] == a.shape[1]
        shape = (a.shape[0], b.shape[1 if trans_b else 2])
    if c is None:
        c = torch.full(shape, float("nan"), dtype=a.dtype)
    assert c.shape == shape
    assert c.dtype == a.dtype
    assert c.is_contiguous()
    assert int(batch_sizes.sum()) == a.shape[0]
    calls.append("weights" if trans_a else "rows^T" if trans_b else "rows")
    start = 0
    for expert, size in enumerate(batch_sizes.tolist()):
        rows = slice(start, start + size)
        start += size
        if not size:
            continue  # its part of c stays as it is
        if trans_a:
            c[expert] = (a[rows].T.float() @ b[rows].float()).bfloat16()
        else:
            matrix = b[expert].T if trans_b else b[expert]
            c[rows] = (a[rows].float() @ matrix.float()).bfloat16()
    return c


def modules() -> dict[str, ModuleType]:
    """``grouped_gemm`` with what the backend asks it for."""
    package, backend = ModuleType("grouped_gemm"), ModuleType("grouped_gemm.backend")
    package.__path__ = []
    backend.gmm = gmm  # type: ignore[attr-defined]
    return {module.__name__: module for module in (package, backend)}


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend be looked for again."""
    for name in ("_resolved", "_broken"):
        monkeypatch.setattr(backends, name, {})
    monkeypatch.setitem(backends._loaded, "megablocks", {})
    _unload()


def _unload() -> None:
    sys.modules.pop("moe_kernels.backends.megablocks", None)
    known = sys.modules.get("moe_kernels.backends.megablocks.library")
    if known is not None:
        known.find_gmm.cache_clear()


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend with this stand-in, on CPU tensors."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    row = backends.BACKENDS["megablocks"]
    here = dataclasses.replace(row, device_types=("cpu",), on_request=("cpu",))
    monkeypatch.setitem(backends.BACKENDS, "megablocks", here)
    forget(monkeypatch)
    register_for_cpu()
    calls.clear()
    yield
    _unload()


@functools.cache
def register_for_cpu() -> None:
    """Let PyTorch's dispatcher find the backend's kernels on a CPU, too."""
    experts = importlib.import_module("moe_kernels.backends.megablocks.experts")
    for op in (experts.ops.expert_mlp, experts.ops.expert_mlp_bwd):
        library.impl(f"{op.name}.megablocks", op["megablocks"].kernel, "CPU")
    for op in (experts.parts.expert_mlp_parts, experts.parts.expert_mlp_parts_bwd):
        library.impl(f"{op.name}.megablocks", op["megablocks"].kernel, "CPU")
