"""Expert MLP of the Triton backend in Triton's interpreter: values, gradients and edge cases."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.testing import assert_as_accurate, make_logits

from . import expert_cases as cases

if (reason := BACKENDS["triton"].why_not("expert_mlp", "cpu")) is not None:
    pytest.skip(f"the triton backend {reason}", allow_module_level=True)

ROWS = (0, 1, 17, 16)  # of each expert; a tile has 16
HIDDEN, INNER = 20, 35  # tiles have 32 columns and steps of 16
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    with mk.use_backend("triton"):
        yield "triton"


def compare(
    plan: mk.RoutingPlan, tensors: cases.Tensors, activation: str = "swiglu"
) -> cases.Tensors:
    upstream = torch.randn(tensors["x"].shape).to(tensors["x"].dtype)
    actual = cases.results(plan, tensors, upstream, activation)
    cases.assert_accurate(actual, plan, tensors, upstream, activation)
    return actual


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_ragged_groups_are_as_accurate_as_plain_pytorch(activation, dtype):
    plan = cases.ragged_plan(ROWS)
    tensors = cases.make_tensors(plan, HIDDEN, INNER, activation, dtype, terms=cases.TERMS)
    actual = compare(plan, tensors, activation)
    for name in cases.WEIGHTS:  # the expert without rows: zeros, in memory that held NaN
        assert torch.equal(actual[name][0], torch.zeros_like(actual[name][0])), name


@pytest.mark.parametrize(
    ("activation", "dtype"), list(zip(cases.ACTIVATIONS, cases.DTYPES, strict=True)), ids=str
)
def test_equal_groups_are_as_accurate_as_plain_pytorch(activation, dtype):
    plan = cases.equal_plan(26, 3)  # 12 rows an expert, from two groups
    compare(plan, cases.make_tensors(plan, 18, 36, activation, dtype, bias=False), activation)


@pytest.mark.parametrize("terms", [("shared",), ("residual",)])
@pytest.mark.parametrize("bias", [False, True])
def test_biases_and_terms_are_optional(bias, terms):
    for plan in (cases.ragged_plan((3, 0, 18)), cases.equal_plan(18, 3)):
        tensors = cases.make_tensors(plan, 9, 11, "gelu", bias=bias, terms=terms)
        compare(plan, tensors, "gelu")


@pytest.mark.parametrize("one_bias", ["bias_in", "bias_out"])
def test_one_bias_without_the_other(one_bias):
    plan = cases.ragged_plan((3, 0, 18))
    tensors = cases.make_tensors(plan, 9, 11)
    del tensors["bias_out" if one_bias == "bias_in" else "bias_in"]
    compare(plan, tensors)


def edge_plans() -> dict[str, mk.RoutingPlan]:
    def token_choice(tokens: int, experts: int, top_k: int) -> mk.RoutingPlan:
        return mk.token_choice(make_logits(tokens, experts), top_k, backend="reference")

    return {
        "all tokens to one expert": cases.ragged_plan((0, 19, 0)),
        "one expert": token_choice(19, 1, 1),
        "one expert chooses": cases.equal_plan(18, 1, 0.5),
        "every expert of a token": token_choice(10, 3, 3),
        "every token of an expert": cases.equal_plan(10, 3, 3.0),
        "several rows a token": token_choice(24, 5, 2),
        "one token": token_choice(1, 4, 2),
        "one token chosen by all": cases.equal_plan(1, 3, 3.0, groups=1),
        "more experts than tokens": token_choice(3, 20, 2),
    }


EDGES = (
    "all tokens to one expert",
    "one expert",
    "one expert chooses",
    "every expert of a token",
    "every token of an expert",
    "several rows a token",
    "one token",
    "one token chosen by all",
    "more experts than tokens",
)


@pytest.mark.parametrize("edge", EDGES)
def test_edges_are_as_accurate_as_plain_pytorch(edge):
    plan = edge_plans()[edge]
    compare(plan, cases.make_tensors(plan, 6, 10))


@pytest.mark.parametrize(("hidden", "inner"), [(9, 33), (33, 9), (130, 7), (7, 130), (1, 1)])
def test_odd_widths_are_as_accurate_as_plain_pytorch(hidden, inner):
    plan = cases.ragged_plan((2, 0, 5))
    compare(plan, cases.make_tensors(plan, hidden, inner))


@pytest.mark.parametrize("route", ["token_choice", "expert_choice"])
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_no_tokens_give_empty_rows_and_zero_gradients(route, activation):
    plan = getattr(mk, route)(torch.zeros(0, 3), backend="reference")
    tensors = cases.make_tensors(plan, 9, 11, activation, terms=cases.TERMS)
    found = cases.results(plan, tensors, torch.zeros(0, 9), activation)
    for name, gradient in found.items():
        shape = tensors["x" if name == "out" else name].shape
        assert torch.equal(gradient, torch.zeros(shape)), name


def strided(tensor: Tensor) -> Tensor:
    """The same values, no two of them neighbours in memory."""
    wide = torch.full((*tensor.shape, 2), NAN, dtype=tensor.dtype)
    wide[..., 1] = tensor
    return wide[..., 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_change_a_bit(dtype):
    plan = cases.ragged_plan((3, 0, 17))
    tensors = cases.make_tensors(plan, 9, 11, dtype=dtype, terms=cases.TERMS)
    row = torch.randn(1, 9).to(dtype)
    dense = cases.results(plan, tensors, row.repeat(20, 1), "swiglu")
    for upstream in (row.expand(20, -1), strided(row.repeat(20, 1))):
        found = cases.results(plan, tensors, upstream, "swiglu", make=strided)
        cases.assert_same_bits(found, dense)


def test_each_combination_of_wanted_gradients_gives_those_of_all():
    plan, activation = cases.ragged_plan((2, 2)), "swiglu"
    tensors = cases.make_tensors(plan, 3, 5, activation)
    operands = [tensors[name] for name in ("x", "routing_weights", *cases.WEIGHTS)]
    indices = (plan.token_indices, plan.row_indices, plan.row_offsets, plan.expert_offsets)
    settings = (*operands, *indices, 0, activation)
    terms = (None, None)
    _, h = torch.ops.moe_kernels.expert_mlp.triton(*operands, *terms, *indices, 0, activation)
    dout = torch.randn(4, 3)

    def backward(wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
        return torch.ops.moe_kernels.expert_mlp_bwd.triton(dout, h, list(wanted), *settings)

    everything = backward((True,) * 6)
    for wanted in itertools.product([False, True], repeat=6):
        for gradient, full, want in zip(backward(wanted), everything, wanted, strict=True):
            assert torch.equal(gradient, full if want else torch.empty(0)), wanted


def test_frozen_inputs_leave_the_other_gradients_as_they_are():
    plan = cases.ragged_plan((2, 0, 4))
    tensors = cases.make_tensors(plan, 5, 3, terms=cases.TERMS)
    upstream = torch.randn(6, 5)
    everything = cases.results(plan, tensors, upstream, "swiglu")
    for name in cases.WEIGHTS + cases.TERMS + ("x",):
        leaves = {n: t.detach().clone().requires_grad_(n == name) for n, t in tensors.items()}
        weights = {n: leaves[n] for n in cases.WEIGHTS + cases.TERMS}
        out = mk.expert_mlp(leaves["x"], plan, **weights, activation="swiglu")
        (gradient,) = torch.autograd.grad(out, leaves[name], upstream)
        assert torch.equal(gradient, everything[name]), name


@pytest.mark.parametrize("kind", ["token_choice", "expert_choice"])
def test_plans_of_the_reference_give_the_bits_of_plans_of_triton(kind):
    logits = make_logits(18, 4)
    own, reference = (getattr(mk, kind)(logits, backend=b) for b in ("triton", "reference"))
    assert torch.equal(own.token_indices, reference.token_indices)
    tensors = cases.make_tensors(reference, 9, 11)
    upstream = torch.randn(18, 9)
    found = [cases.results(plan, tensors, upstream, "swiglu") for plan in (own, reference)]
    cases.assert_same_bits(*found)


def test_fp64_is_served_by_the_reference():
    plan = cases.ragged_plan((2, 0, 4))
    tensors = {n: t.double() for n, t in cases.make_tensors(plan, 5, 3).items()}
    case = (plan, tensors, torch.randn(6, 5).double(), "swiglu")
    cases.assert_same_bits(cases.results(*case), cases.results(*case, backend="reference"))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_a_token_that_is_no_number_leaves_other_tokens_and_experts_alone(value, activation):
    plan = cases.ragged_plan((5, 9, 4))
    tensors = cases.make_tensors(plan, 9, 11, activation)
    upstream = torch.randn(18, 9)
    clean = cases.results(plan, tensors, upstream, activation)
    sick = 7
    tensors["x"][sick, 3] = value
    found = cases.results(plan, tensors, upstream, activation)
    expert = int(plan.expert_of_row[plan.row_indices[sick]])
    assert not bool(torch.isfinite(found["out"][sick]).all())
    for name, result in found.items():
        by_expert = name in cases.WEIGHTS
        row = int(plan.row_indices[sick])
        place = expert if by_expert else row if name == "routing_weights" else sick
        others = torch.arange(result.shape[0]) != place
        assert torch.equal(result[others], clean[name][others]), name


@pytest.mark.parametrize(
    ("equal", "dtype"), list(zip((False, True, False), cases.DTYPES, strict=True)), ids=str
)
def test_grouped_gemm_is_as_accurate_as_plain_pytorch(dtype, equal):
    plan = cases.equal_plan(34, 3) if equal else cases.ragged_plan((0, 17, 18))
    rows, w = torch.randn(plan.num_rows, 18).to(dtype), torch.randn(3, 35, 18).to(dtype)
    upstream, found = torch.randn(plan.num_rows, 35), []
    for name, to in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [rows.to(to).requires_grad_(), w.to(to).requires_grad_()]
        out = mk.grouped_gemm(
            *leaves, plan.expert_offsets, rows_per_expert=plan.rows_per_expert, backend=name
        )
        found.append([out, *torch.autograd.grad(out, leaves, upstream.to(dtype).to(to))])
    for actual, plain, exact in zip(*found, strict=True):
        assert_as_accurate(actual, plain, exact)
