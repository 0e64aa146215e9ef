"""The ops of rows, experts and activations as Triton runs them: what PyTorch is told holds."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import moe_kernels as mk
import moe_kernels.ops
from moe_kernels.backends import BACKENDS
from moe_kernels.ops.operator import Operator

from . import expert_cases as cases
from .expert_parts import as_parts

if (reason := BACKENDS["triton"].why_not("expert_mlp", "cpu")) is not None:
    pytest.skip(f"the triton backend {reason}", allow_module_level=True)

TOKENS, EXPERTS, HIDDEN, INNER = 6, 2, 5, 3
BIASED, PLAIN = ("swiglu", True), ("gelu_tanh", False)
Samples = Iterator[tuple[str, tuple[Any, ...]]]


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    torch._dynamo.reset()
    with mk.use_backend("triton"):
        yield "triton"


def operators() -> dict[str, Operator]:
    found: dict[str, Operator] = {}
    for module in pkgutil.iter_modules(moe_kernels.ops.__path__):
        members = vars(importlib.import_module(f"moe_kernels.ops.{module.name}")).values()
        found |= {member.name: member for member in members if isinstance(member, Operator)}
    return found


def test_every_operator_has_a_triton_variant():
    for name, operator in operators().items():
        assert "triton" in operator.variants, name
        assert operator["triton"].overload is getattr(torch.ops.moe_kernels, name).triton


def make_plan(equal: bool = False) -> mk.RoutingPlan:
    return cases.equal_plan(TOKENS, EXPERTS, 1.0) if equal else cases.ragged_plan((2, 4))


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape) * 0.5).to(dtype).requires_grad_()


def row_samples(dtype: torch.dtype) -> Samples:
    plan = make_plan(True)
    weights = plan.routing_weights.detach()
    x, rows = leaf(TOKENS, HIDDEN, dtype=dtype), leaf(plan.num_rows, HIDDEN, dtype=dtype)
    plain_x, plain_rows = x.detach(), rows.detach()
    indices = (plan.token_indices, plan.row_indices, plan.row_offsets)
    yield "dispatch", (x, *indices)
    shared = leaf(TOKENS, HIDDEN, dtype=dtype)
    for terms in ((None, None), (shared, None), (shared, x)):
        yield "combine", (rows, weights.clone().requires_grad_(), *terms, *indices)
    yield "gather", (plain_x, plan.token_indices, None, None)
    yield "gather", (plain_x, plan.token_indices, weights, None)
    yield "gather", (plain_x, plan.token_indices, weights, plain_rows)
    yield "sum_rows", (plain_rows, None, *indices[1:])
    yield "sum_rows", (plain_rows, weights, *indices[1:])


def activation_samples(dtype: torch.dtype) -> Samples:
    for name in cases.ACTIVATIONS:
        h = leaf(2, 3, 10, dtype=dtype)
        width = 5 if name == "swiglu" else 10
        yield "activation", (h, name)
        yield "activation_bwd", (torch.randn(2, 3, width).to(dtype), h.detach(), name)


def gemm_samples(dtype: torch.dtype) -> Samples:
    for equal in (False, True) if dtype == torch.float32 else (dtype == torch.float16,):
        plan = make_plan(equal)
        groups = (plan.expert_offsets, plan.rows_per_expert or 0)
        rows = leaf(plan.num_rows, HIDDEN, dtype=dtype)
        w = leaf(EXPERTS, INNER, HIDDEN, dtype=dtype)
        yield "grouped_gemm", (rows, w, *groups)
        dout = torch.randn(plan.num_rows, INNER).to(dtype)
        for wanted in ([True, True], [False, True], [True, False]):
            yield "grouped_gemm_bwd", (dout, wanted, rows.detach(), w.detach(), *groups)


def mlp_samples(dtype: torch.dtype) -> Samples:
    """Biases, shared and residual with equal groups and SwiGLU; none of them otherwise."""
    for equal, (activation, bias) in ((True, BIASED), (False, PLAIN)):
        plan = make_plan(equal)
        terms = cases.TERMS if bias else ()
        tensors = cases.make_tensors(plan, HIDDEN, INNER, activation, dtype, bias=bias, terms=terms)
        names = ("x", "routing_weights", *cases.WEIGHTS, *cases.TERMS)
        operands = [tensors.get(name) for name in names]
        indices = (plan.token_indices, plan.row_indices, plan.row_offsets, plan.expert_offsets)
        settings = (*indices, plan.rows_per_expert or 0, activation)
        leaves = [None if t is None else t.clone().requires_grad_() for t in operands]
        yield "expert_mlp", (*leaves, *settings)
        yield "expert_mlp_parts", as_parts((*leaves, *settings), 2)
        out, h = torch.ops.moe_kernels.expert_mlp.triton(*operands, *settings)
        dout = torch.randn_like(out)
        for wanted in ([True] * 4 + [bias] * 2, [True, False, True, False, bias, False]):
            args = (dout, h, wanted, *operands[:6], *settings)
            yield "expert_mlp_bwd", args
            yield "expert_mlp_parts_bwd", as_parts(args, 5)


SAMPLES: tuple[Callable[[torch.dtype], Samples], ...]
SAMPLES = (row_samples, activation_samples, gemm_samples, mlp_samples)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("samples", SAMPLES, ids=lambda samples: samples.__name__)
def test_opcheck(samples, dtype):
    for name, args in samples(dtype):
        opcheck(getattr(torch.ops.moe_kernels, name).triton, args)


def test_every_operator_but_those_of_routing_has_samples():
    routing = vars(importlib.import_module("moe_kernels.ops.route")).values()
    routed = {member.name for member in routing if isinstance(member, Operator)}
    sampled = {name for samples in SAMPLES for name, _ in samples(torch.float32)}
    assert sampled == set(operators()) - routed
