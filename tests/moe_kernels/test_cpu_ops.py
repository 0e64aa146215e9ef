"""The ops of ``torch.ops.moe_kernels`` on the CPU: what PyTorch is told about them holds."""

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import moe_kernels as mk
import moe_kernels.ops
from moe_kernels.backends import BACKENDS
from moe_kernels.ops.operator import Operator
from moe_kernels.testing import make_logits

from .expert_parts import as_parts

if (reason := BACKENDS["cpu"].why_not("expert_mlp", "cpu")) is not None:
    pytest.skip(f"the cpu backend {reason}", allow_module_level=True)

TOKENS, EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 24, 4, 9, 11, 2
LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    torch._dynamo.reset()
    with mk.use_backend("cpu"):
        yield "cpu"


def route(kind: str, logits: Tensor, **options: Any) -> mk.RoutingPlan:
    if kind == "token_choice":
        return mk.token_choice(logits, TOP_K, num_groups=2, **options)
    return mk.expert_choice(logits, 1.5, num_groups=2, **options)


def make_plan(kind: str = "token_choice", dtype: torch.dtype = torch.float32) -> mk.RoutingPlan:
    return route(kind, make_logits(TOKENS, EXPERTS, dtype=dtype))


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape) * 0.5).to(dtype).requires_grad_()


def mlp_tensors(activation: str, bias: bool, dtype: torch.dtype) -> list[Tensor | None]:
    """x, w_in, w_out, bias_in, bias_out."""
    into = 2 * INTERMEDIATE if activation == "swiglu" else INTERMEDIATE
    shapes = [(TOKENS, HIDDEN), (EXPERTS, into, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)]
    tensors: list[Tensor | None] = [leaf(*shape, dtype=dtype) for shape in shapes]
    biases = [leaf(EXPERTS, into, dtype=dtype), leaf(EXPERTS, HIDDEN, dtype=dtype)]
    return tensors + (biases if bias else [None, None])


def indices(plan: mk.RoutingPlan) -> tuple[Tensor, ...]:
    return plan.token_indices, plan.row_indices, plan.row_offsets, plan.expert_offsets


def mlp_args(activation: str, bias: bool, dtype: torch.dtype, kind: str) -> tuple[Any, ...]:
    plan = make_plan(kind)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, *others = mlp_tensors(activation, bias, dtype)
    weights = plan.routing_weights.to(wide).requires_grad_()
    terms = [leaf(*x.shape, dtype=dtype), leaf(*x.shape, dtype=dtype)] if bias else [None, None]
    return (x, weights, *others, *terms, *indices(plan), plan.rows_per_expert or 0, activation)


def route_samples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for dtype in (torch.float32, torch.float64):
        logits = make_logits(TOKENS, EXPERTS, dtype=dtype).requires_grad_()
        bias = torch.randn(EXPERTS, dtype=dtype) * 0.1
        yield "token_choice", (logits, None, TOP_K, "softmax", False, 1.0, 1, 1, 2, True)
        yield "token_choice", (logits, bias, TOP_K, "sigmoid", True, 2.5, 2, 1, 1, False)
        yield "expert_choice", (logits, 5, "softmax", False, 1.0, 2, True)
        yield "expert_choice", (logits, 5, "sigmoid", True, 2.5, 1, False)
        yield "expert_choice", (logits, 5, "identity", False, 1.0, 1, False)
        for name in ("softmax", "sigmoid", "identity"):
            yield "affinity", (logits, name)
        plan = mk.token_choice(logits.detach(), TOP_K)
        pairs = (logits, plan.packed_indices.row_experts, plan.row_offsets)
        yield "similarity", pairs
        logits = logits.detach()
        loss_weights = torch.ops.moe_kernels.similarity.cpu(logits, *pairs[1:])[1]
        yield "similarity_bwd", (logits, loss_weights, torch.randn((), dtype=dtype))
        scalar = torch.randn((), dtype=dtype)
        weights, *_, packed = torch.ops.moe_kernels.expert_choice.cpu(
            logits, 5, "softmax", True, 1.5, 2, True
        )
        upstream = (torch.randn_like(weights), scalar, scalar, torch.randn(2 + EXPERTS).to(dtype))
        settings = (weights.shape[0], 2, "softmax", True, 1.5)
        for used in (upstream, (upstream[0], None, None, None), (None, scalar, None, None)):
            yield "route_bwd", (logits, packed, *used, *settings)


def row_samples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    plan = make_plan("expert_choice")
    for dtype in (torch.float32, torch.float64, *LOW):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weights = plan.routing_weights.to(wide)
        x = leaf(TOKENS, HIDDEN, dtype=dtype)
        rows = leaf(plan.num_rows, HIDDEN, dtype=dtype)
        plain_x, plain_rows = x.detach(), rows.detach()
        yield "dispatch", (x, plan.token_indices, plan.row_indices, plan.row_offsets)
        for terms in ((None, None), (leaf(TOKENS, HIDDEN, dtype=dtype), x)):
            yield "combine", (rows, weights.clone().requires_grad_(), *terms, *indices(plan)[:3])
        yield "gather", (plain_x, plan.token_indices, None, None)
        yield "gather", (plain_x, plan.token_indices, weights, plain_rows)
        yield "sum_rows", (plain_rows, None, plan.row_indices, plan.row_offsets)
        yield "sum_rows", (plain_rows, weights, plan.row_indices, plan.row_offsets)


def expert_samples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    cases = [
        ("gelu_tanh", False, torch.float32, "token_choice"),
        ("swiglu", True, torch.float32, "expert_choice"),
        ("gelu", True, torch.float64, "token_choice"),
        ("swiglu", False, torch.bfloat16, "token_choice"),
        ("gelu", True, torch.float16, "expert_choice"),
    ]
    for case in cases:
        args = mlp_args(*case)
        yield "expert_mlp", args
        yield "expert_mlp_parts", as_parts(args, 2)
        plain = [a.detach() if isinstance(a, Tensor) else a for a in args]
        out, h = torch.ops.moe_kernels.expert_mlp.cpu(*plain)
        for wanted in ([True] * 4 + [case[1]] * 2, [False, True, False, True, False, case[1]]):
            operands = (*plain[:6], *plain[8:])  # without shared and residual
            bwd_args = (torch.randn_like(out), h, wanted, *operands)
            yield "expert_mlp_bwd", bwd_args
            yield "expert_mlp_parts_bwd", as_parts(bwd_args, 5)
    plan = make_plan()
    for dtype in (torch.float32, torch.bfloat16):
        rows = leaf(plan.num_rows, HIDDEN, dtype=dtype)
        w = leaf(EXPERTS, INTERMEDIATE, HIDDEN, dtype=dtype)
        yield "grouped_gemm", (rows, w, plan.expert_offsets, 0)
        dout = torch.randn(plan.num_rows, INTERMEDIATE).to(dtype)
        for wanted in ([True, True], [False, True], [True, False]):
            operands = (rows.detach(), w.detach(), plan.expert_offsets, 0)
            yield "grouped_gemm_bwd", (dout, wanted, *operands)


SAMPLES: tuple[Callable[[], Iterator[tuple[str, tuple[Any, ...]]]], ...]


def activation_samples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for dtype in (torch.float32, torch.float64, *LOW):
        for name in ("gelu_tanh", "gelu", "swiglu"):
            h = leaf(3, 7, 10, dtype=dtype)
            width = 5 if name == "swiglu" else 10
            yield "activation", (h, name)
            yield "activation_bwd", (torch.randn(3, 7, width).to(dtype), h.detach(), name)


SAMPLES = (route_samples, row_samples, expert_samples, activation_samples)


@pytest.mark.parametrize("samples", SAMPLES, ids=lambda samples: samples.__name__)
def test_opcheck(samples):
    for name, args in samples():
        opcheck(getattr(torch.ops.moe_kernels, name).cpu, args)


def test_every_operator_has_samples():
    operators = set()
    for module in pkgutil.iter_modules(moe_kernels.ops.__path__):
        members = vars(importlib.import_module(f"moe_kernels.ops.{module.name}")).values()
        operators |= {member.name for member in members if isinstance(member, Operator)}
    assert {name for samples in SAMPLES for name, _ in samples()} == operators


@pytest.mark.parametrize("kind", ["token_choice", "expert_choice"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_flops_are_those_of_the_products(kind, activation):
    plan = make_plan(kind)
    x, w_in, w_out, bias_in, bias_out = mlp_tensors(activation, True, torch.float32)
    into = w_in.shape[1]
    forward = 2 * plan.num_rows * (into * HIDDEN + HIDDEN * INTERMEDIATE)
    with FlopCounterMode(display=False) as counter:
        out = mk.expert_mlp(
            x, plan, w_in, w_out, activation=activation, bias_in=bias_in, bias_out=bias_out
        )
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out, [x, w_in, w_out, bias_in, bias_out], torch.randn_like(out))
    assert counter.get_total_flops() == 2 * forward


def test_autocast_rule_of_the_products():
    args = mlp_args("swiglu", True, torch.float32, "token_choice")
    plan = make_plan()
    rows, w = leaf(plan.num_rows, HIDDEN), leaf(EXPERTS, INTERMEDIATE, HIDDEN)
    low = [
        a.detach().bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    ]
    low[1] = args[1]  # routing weights stay in fp32
    low[6:8] = args[6:8]  # and so does what is added to the result
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, h = torch.ops.moe_kernels.expert_mlp.cpu(*args)
        product = torch.ops.moe_kernels.grouped_gemm.cpu(rows, w, plan.expert_offsets, 0)
    assert {out.dtype, h.dtype, product.dtype} == {torch.bfloat16}
    assert torch.equal(out, torch.ops.moe_kernels.expert_mlp.cpu(*low)[0])
    operands = (rows.bfloat16(), w.bfloat16(), plan.expert_offsets, 0)
    assert torch.equal(product, torch.ops.moe_kernels.grouped_gemm.cpu(*operands))
    gradients = torch.autograd.grad(out, [args[0], args[1], args[2]], torch.randn_like(out))
    assert [g.dtype for g in gradients] == [torch.float32] * 3


@pytest.mark.parametrize("kind", ["token_choice", "expert_choice"])
def test_autocast_leaves_routing_in_fp32(kind):
    logits = make_logits(TOKENS, EXPERTS).requires_grad_()
    plain = route(kind, logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = route(kind, logits)
        losses = [
            mk.load_balance_loss(plan),
            mk.router_z_loss(plan),
            mk.router_similarity_loss(plan),
        ]
    for tensor in (plan.routing_weights, plan.router_probs, *losses):
        assert tensor.dtype == torch.float32
    assert torch.equal(plan.token_indices, plain.token_indices)
    assert torch.equal(plan.routing_weights, plain.routing_weights)


def whole_pipeline(logits: Tensor, tensors: list[Tensor], kind: str) -> list[Tensor]:
    """Every stage once: floating results that carry a gradient."""
    plan = route(kind, logits, normalize="per_token")
    x, w_in, w_out, bias_in, bias_out = tensors
    biases = {"bias_in": bias_in, "bias_out": bias_out}
    rows = mk.dispatch(x, plan)
    h = mk.grouped_gemm(rows, w_in, plan.expert_offsets)
    return [
        plan.routing_weights,
        plan.router_probs,
        mk.load_balance_loss(plan),
        mk.load_balance_loss(plan, per_sequence=True),
        mk.router_z_loss(plan),
        mk.router_similarity_loss(plan),
        h,
        mk.combine(rows, plan),
        mk.expert_mlp(x, plan, w_in, w_out, activation="swiglu", **biases),
    ]


FORWARD = {"affinity", "similarity", "dispatch", "grouped_gemm", "combine", "expert_mlp"}
BACKWARD = {"route_bwd", "similarity_bwd", "sum_rows", "gather", "grouped_gemm_bwd"}
BACKWARD |= {"expert_mlp_bwd"}


class Watch(TorchDispatchMode):
    """Collects the names of our ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moe_kernels":
            self.seen.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


class Watched(Tensor):
    """A tensor subclass that collects the names of our ops."""

    seen: set[str] = set()  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "namespace", "") == "moe_kernels":
            cls.seen.add(func.__name__.partition(".")[0])
        return super().__torch_function__(func, types, args, kwargs or {})


def run(kind: str, how: str = "plain") -> tuple[list[Tensor], set[str]]:
    """Results and gradients of the whole pipeline, and the ops that were seen."""
    torch.manual_seed(0)
    logits = make_logits(TOKENS, EXPERTS).requires_grad_()
    tensors = mlp_tensors("swiglu", True, torch.float32)
    leaves = [logits, *tensors]
    if how == "subclass":
        Watched.seen = set()
        leaves = [tensor.detach().as_subclass(Watched).requires_grad_() for tensor in leaves]
    call = whole_pipeline
    if how == "compile":
        call = torch.compile(whole_pipeline, fullgraph=True, backend="aot_eager")
    watch = Watch()
    with watch if how == "mode" else contextlib.nullcontext():
        outputs = call(leaves[0], leaves[1:], kind)
        upstream = [torch.randn(out.shape) for out in outputs]
        gradients = torch.autograd.grad(outputs, leaves, upstream)
    seen = Watched.seen if how == "subclass" else watch.seen
    return [t.as_subclass(Tensor) for t in (*outputs, *gradients)], seen


@pytest.mark.parametrize("kind", ["token_choice", "expert_choice"])
@pytest.mark.parametrize("how", ["mode", "subclass", "compile"])
def test_dispatcher_path_gives_the_bits_of_the_plain_path(kind, how):
    plain, _ = run(kind)
    through, seen = run(kind, how)
    if how == "mode":
        assert seen == {kind} | FORWARD | BACKWARD
    if how == "subclass":  # torch.autograd.grad switches __torch_function__ off
        assert seen == {kind} | FORWARD
    for a, b in zip(through, plain, strict=True):
        assert torch.equal(a, b)
