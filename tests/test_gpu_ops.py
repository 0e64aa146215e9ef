"""What PyTorch is told about every op holds where kernels run it: ``opcheck`` on recorded calls."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import moe_kernels as mk
import moe_kernels.ops
from moe_kernels.ops.operator import Operator

from .gpu_cases import (
    DEVICES,
    ROUTED_BY,
    draw,
    equal_plan,
    layer_step,
    make_layer,
    ragged_plan,
    sixteen_bit,
)

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


# What the CUDA backend has kernels for.
ROUTING_AND_ROWS = {
    *("expert_choice", "token_choice", "affinity", "route_bwd"),
    *("dispatch", "combine", "gather", "sum_rows"),
}


@pytest.fixture(autouse=True, params=ROUTED_BY)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    torch._dynamo.reset()
    with mk.use_backend(request.param):
        yield request.param.partition(",")[0]


def operators() -> dict[str, Operator]:
    """Every op of the package by name."""
    found: dict[str, Operator] = {}
    for module in pkgutil.iter_modules(moe_kernels.ops.__path__):
        members = vars(importlib.import_module(f"moe_kernels.ops.{module.name}")).values()
        found |= {member.name: member for member in members if isinstance(member, Operator)}
    return found


class Recorder(TorchDispatchMode):
    """Keeps the first call of every overload of the package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moe_kernels":
            self.calls.setdefault(func, tuple(map(detached, args)))
        return func(*args, **(kwargs or {}))


def detached(value: Any) -> Any:
    if isinstance(value, list):
        return [detached(element) for element in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


def leaf(value: Any) -> Any:
    """The value, differentiable if it can be."""
    if isinstance(value, list):
        return [leaf(element) for element in value]
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.requires_grad_() if floating else value


def record(device: str) -> dict[Any, tuple[Any, ...]]:
    """Calls of every op in two layers' steps, and of those that layers do not use."""
    hidden, inner, experts = (64, 96, 4) if device == "cuda" else (8, 16, 3)
    shape = (2, 32, hidden) if device == "cuda" else (2, 6, hidden)
    dtype = sixteen_bit(device)
    with Recorder() as recorder:
        for kind in ("expert choice", "token choice"):
            layer = make_layer(
                device, kind, dtype, hidden, inner, experts, shared_intermediate_size=inner
            )
            x = draw(device, *shape, dtype=dtype).requires_grad_()
            layer_step(layer, x, torch.randn_like(x))
        for plan in (equal_plan(device, 24, experts), ragged_plan(device, 24, experts)):
            logits = plan.router_logits.detach().requires_grad_()
            routed = mk.token_choice(logits, 2)
            loss = mk.router_similarity_loss(routed) + routed.router_probs.square().sum()
            torch.autograd.grad(loss, logits)
            tokens = draw(device, 24, hidden, dtype=dtype).requires_grad_()
            rows = mk.dispatch(tokens, plan)
            w = draw(device, experts, inner, hidden, dtype=dtype).requires_grad_()
            y = mk.grouped_gemm(rows, w, plan.expert_offsets)
            torch.autograd.grad(y, [rows, w], torch.randn_like(y))
            down = draw(device, experts, hidden, inner, dtype=dtype)
            parts = [leaf(part) for part in (*w.detach().clone(), *down)]
            y = mk.expert_mlp(tokens, plan, parts[:experts], parts[experts:])
            torch.autograd.grad(y, parts, torch.randn_like(y))
            out = mk.combine(rows, plan)
            torch.autograd.grad(out, tokens, torch.randn_like(out))
    return recorder.calls


@pytest.mark.parametrize("device", DEVICES)
def test_every_op_passes_opcheck(device, backend):
    known = operators()
    overloads = {
        variant.overload: operator
        for operator in known.values()
        for variant in operator.variants.values()
    }
    calls = record(device)
    assert {overloads[overload].name for overload in calls} == set(known)
    served = {overloads[overload].name for overload in calls if overload._overloadname == backend}
    assert served == (set(known) if backend == "triton" else ROUTING_AND_ROWS)
    for overload, args in calls.items():
        if overloads[overload].backward is not None:
            args = tuple(map(leaf, args))
        opcheck(overload, args, test_utils=CHECKS)
