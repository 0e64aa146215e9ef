"""Expert MLP and its backward on the CPU: shapes that cross its pieces, and what it refuses."""

import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.testing import assert_as_accurate, make_logits

if (reason := BACKENDS["cpu"].why_not("expert_mlp", "cpu")) is not None:
    pytest.skip(f"the cpu backend {reason}", allow_module_level=True)
experts = importlib.import_module("moe_kernels.backends.cpu.experts")
products = importlib.import_module("moe_kernels.backends.cpu.products")

ROWS = (0, 1, 63, 64, 65, 300)  # of each expert; a product has at most 64 rows here
HIDDEN, INTERMEDIATE = 33, 70
SIZES = (len(ROWS), HIDDEN, INTERMEDIATE)
ACTIVATIONS = ("gelu_tanh", "gelu", "swiglu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = ("w_in", "w_out", "bias_in", "bias_out")


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    with mk.use_backend("cpu"):
        yield "cpu"


def uneven_logits() -> Tensor:
    """Logits whose best experts are taken by exactly ``ROWS`` tokens, in a mixed order."""
    best = torch.arange(len(ROWS)).repeat_interleave(torch.tensor(ROWS))
    best = best[torch.randperm(best.shape[0])]
    return torch.nn.functional.one_hot(best, len(ROWS)) * 3 + torch.rand(best.shape[0], len(ROWS))


def make_weights(
    activation: str, bias: bool, dtype: torch.dtype, shape: tuple[int, int, int] = SIZES
) -> dict[str, Tensor]:
    count, hidden, intermediate = shape
    into = 2 * intermediate if activation == "swiglu" else intermediate
    shapes = ((count, into, hidden), (count, hidden, intermediate), (count, into), (count, hidden))
    used = list(zip(NAMES, shapes, strict=True))[: 4 if bias else 2]
    return {name: (torch.randn(shape) * 0.3).to(dtype).requires_grad_() for name, shape in used}


def small_case(activation: str = "swiglu", dtype: torch.dtype = torch.float64):
    """Plan, tokens and weights of a few rows."""
    plan = mk.token_choice(make_logits(10, 3, dtype=torch.float64), 2)
    x = torch.randn(10, 5, dtype=dtype, requires_grad=True)
    return plan, x, make_weights(activation, True, dtype, (3, 5, 7))


def run(
    name: str,
    to: torch.dtype,
    plan: mk.RoutingPlan,
    x: Tensor,
    weights: dict[str, Tensor],
    upstream: Tensor,
    activation: str,
) -> list[Tensor]:
    """Output and gradients of tokens, routing weights, matrices and biases on one backend."""
    wide = torch.float64 if to == torch.float64 else torch.float32
    gates = plan.routing_weights.detach().to(wide).requires_grad_()
    plan = dataclasses.replace(plan, routing_weights=gates)
    leaves = {n: t.detach().to(to).requires_grad_() for n, t in (("x", x), *weights.items())}
    named = {n: leaves[n] for n in weights}
    out = mk.expert_mlp(leaves["x"], plan, **named, activation=activation, backend=name)
    return [out, *torch.autograd.grad(out, [gates, *leaves.values()], upstream.to(to))]


def compare(plan: mk.RoutingPlan, activation: str, bias: bool, dtype: torch.dtype) -> None:
    x = torch.randn(plan.num_tokens, HIDDEN).to(dtype)
    weights = make_weights(activation, bias, dtype)
    upstream = torch.randn(plan.num_tokens, HIDDEN).to(dtype)
    case = (plan, x, weights, upstream, activation)
    actual, plain = run("cpu", dtype, *case), run("reference", dtype, *case)
    exact = run("reference", torch.float64, *case)
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert a.dtype == p.dtype
        assert_as_accurate(a, p, e)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uneven_experts_are_as_accurate_as_plain_pytorch(activation, bias, dtype):
    plan = mk.token_choice(uneven_logits(), 1)
    assert plan.tokens_per_expert.tolist() == list(ROWS)
    compare(plan, activation, bias, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_rows_a_token_are_as_accurate_as_plain_pytorch(dtype):
    logits = make_logits(330, len(ROWS))
    compare(mk.token_choice(logits, 3), "swiglu", True, dtype)
    compare(mk.expert_choice(logits, num_groups=2), "gelu_tanh", True, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_by_torch_functions_are_as_accurate(activation, dtype, monkeypatch):
    monkeypatch.setattr(experts, "PRODUCTS", products.Products(reason="test"))
    compare(mk.token_choice(uneven_logits(), 1), activation, True, dtype)
    compare(mk.expert_choice(make_logits(64, len(ROWS))), activation, False, dtype)


def test_grouped_gemm_by_torch_functions_is_as_accurate(monkeypatch):
    monkeypatch.setattr(experts, "PRODUCTS", products.Products(reason="test"))
    plan = mk.token_choice(uneven_logits(), 1)
    results = []
    rows, w = torch.randn(plan.num_rows, HIDDEN), make_weights("gelu", False, torch.float32)
    upstream = torch.randn(plan.num_rows, w["w_in"].shape[1])
    for name, dtype in (("cpu", torch.float32), ("reference", torch.float32), ("reference", None)):
        to = dtype or torch.float64
        leaves = [rows.to(to).requires_grad_(), w["w_in"].detach().to(to).requires_grad_()]
        out = mk.grouped_gemm(*leaves, plan.expert_offsets, backend=name)
        results.append([out, *torch.autograd.grad(out, leaves, upstream.to(to))])
    for a, p, e in zip(*results, strict=True):
        assert_as_accurate(a, p, e)


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_frozen_inputs_leave_the_other_gradients_as_they_are(activation, by_torch, monkeypatch):
    if by_torch:
        monkeypatch.setattr(experts, "PRODUCTS", products.Products(reason="test"))
    x, weights = torch.randn(50, HIDDEN), make_weights(activation, True, torch.float32)
    inputs = {"x": x, "logits": make_logits(50, len(ROWS)), **weights}
    upstream = torch.randn(50, HIDDEN)

    def gradients(names: tuple[str, ...]) -> dict[str, Tensor]:
        leaves = {n: t.detach().clone().requires_grad_(n in names) for n, t in inputs.items()}
        plan = mk.token_choice(leaves["logits"], 2)
        named = {n: leaves[n] for n in NAMES}
        out = mk.expert_mlp(leaves["x"], plan, **named, activation=activation)
        found = torch.autograd.grad(out, [leaves[n] for n in names], upstream)
        return dict(zip(names, found, strict=True))

    everything = gradients(tuple(inputs))
    subsets = [(n,) for n in inputs]
    subsets += [tuple(n for n in inputs if n != frozen) for frozen in inputs]
    subsets += [("x", "logits"), ("w_in", "w_out"), ("bias_in", "bias_out"), ("x", "w_in")]
    for names in subsets:
        for name, gradient in gradients(names).items():
            assert torch.equal(gradient, everything[name]), f"{name} when {names} are wanted"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_first_product_is_all_that_is_saved_of_the_rows(activation):
    plan = mk.token_choice(make_logits(40, len(ROWS)).requires_grad_(), 2)
    weights = make_weights(activation, True, torch.float32)
    x = torch.randn(40, HIDDEN, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mk.expert_mlp(x, plan, **weights, activation=activation)
    shapes = [tuple(t.shape) for t in saved if t.is_floating_point()]
    of_rows = [shape for shape in shapes if shape[0] == plan.num_rows and len(shape) > 1]
    assert of_rows == [(plan.num_rows, weights["w_in"].shape[1])]
    inputs = [x.shape, (plan.num_rows,), *(w.shape for w in weights.values())]
    assert sorted(set(shapes) - set(of_rows)) == sorted({tuple(shape) for shape in inputs})


def broken(plan: mk.RoutingPlan, field: str, place: int, value: int) -> mk.RoutingPlan:
    tensor = getattr(plan, field).clone()
    tensor[place] = value
    return dataclasses.replace(plan, **{field: tensor})


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize(
    ("field", "place", "value", "error"),
    [
        ("token_indices", 3, 10, IndexError),
        ("token_indices", 0, -1, IndexError),
        ("row_indices", -1, 20, IndexError),
        ("row_indices", 7, -(2**31), IndexError),
        ("row_offsets", -1, 21, IndexError),
        ("row_offsets", 0, -1, IndexError),
        ("expert_offsets", -1, 19, ValueError),
        ("expert_offsets", -1, 21, ValueError),
        ("expert_offsets", 0, 1, ValueError),
        ("expert_offsets", 1, 25, ValueError),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(field, place, value, error, by_torch, monkeypatch):
    if by_torch:
        monkeypatch.setattr(experts, "PRODUCTS", products.Products(reason="test"))
    plan, x, weights = small_case()
    wrong = broken(plan, field, place, value)
    with pytest.raises(error):
        mk.expert_mlp(x, wrong, **weights, activation="swiglu")
    if field == "token_indices":
        with pytest.raises(error):
            mk.dispatch(x, wrong)
    if field.startswith("row"):
        with pytest.raises(error):
            mk.combine(torch.randn(plan.num_rows, 5, dtype=x.dtype), wrong)
    if field == "expert_offsets":
        with pytest.raises(error):
            mk.grouped_gemm(mk.dispatch(x, plan), weights["w_in"], wrong.expert_offsets)


def strided(tensor: Tensor) -> Tensor:
    """The same values, no two of them neighbours in memory."""
    wide = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype)
    wide[..., 1] = tensor.detach()
    return wide[..., 1].requires_grad_()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_change_a_bit(activation, dtype):
    plan, x, weights = small_case(activation, dtype)

    def results(make, upstream: Tensor) -> list[Tensor]:
        leaves = [make(t) for t in (x, *weights.values())]
        gates = make(plan.routing_weights.detach().float())
        routed = dataclasses.replace(plan, routing_weights=gates)
        named = dict(zip(weights, leaves[1:], strict=True))
        out = mk.expert_mlp(leaves[0], routed, **named, activation=activation)
        return [out, *torch.autograd.grad(out, [gates, *leaves], upstream)]

    row = torch.randn(1, 5).to(dtype)
    dense = results(lambda t: t.detach().clone().requires_grad_(), row.repeat(10, 1))
    for make, upstream in ((strided, row.expand(10, -1)), (strided, strided(row.repeat(10, 1)))):
        for a, b in zip(results(make, upstream.detach()), dense, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_every_input(activation, by_torch, monkeypatch):
    if by_torch:
        monkeypatch.setattr(experts, "PRODUCTS", products.Products(reason="test"))
    plan, x, weights = small_case(activation)
    gates = plan.routing_weights.detach().clone().requires_grad_()

    def call(x: Tensor, gates: Tensor, *others: Tensor) -> Tensor:
        routed = dataclasses.replace(plan, routing_weights=gates)
        named = dict(zip(NAMES, others, strict=True))
        return mk.expert_mlp(x, routed, **named, activation=activation)

    assert torch.autograd.gradcheck(call, (x, gates, *weights.values()))


@pytest.mark.parametrize(
    ("variable", "accepted"),
    [("MOE_KERNELS_PRODUCTS", "auto, blas, torch"), ("MOE_KERNELS_ISA", "baseline")],
)
def test_a_wrong_environment_variable_is_refused_with_the_accepted_values(variable, accepted):
    result = subprocess.run(
        [sys.executable, "-c", "import moe_kernels.backends.cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, variable: "wrong"},
    )
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith(f"ValueError: {variable} is 'wrong'; ")
    assert accepted in message


@pytest.mark.parametrize("name", ["row_indices", "row_offsets", "token_indices"])
def test_indices_of_another_dtype_are_refused_and_strided_ones_are_read_right(name):
    plan = mk.token_choice(make_logits(40, 4), 2)
    x, w = torch.randn(40, 6), torch.randn(4, 6, 6)
    wide = dataclasses.replace(plan, **{name: getattr(plan, name).long()})
    with pytest.raises(ValueError, match=rf"{name} of the plan has dtype torch.int64"):
        mk.expert_mlp(x, wide, w, w)
    indices = getattr(plan, name)
    strided = dataclasses.replace(plan, **{name: torch.stack([indices, indices], 1)[:, 0]})
    assert torch.equal(mk.expert_mlp(x, strided, w, w), mk.expert_mlp(x, plan, w, w))
    rows = mk.dispatch(x, plan)
    assert torch.equal(mk.dispatch(x, strided), rows)
    assert torch.equal(mk.combine(rows, strided), mk.combine(rows, plan))
