"""Dispatch, grouped GEMM, expert MLP and combine: values and gradients against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import moe_kernels as mk
from moe_kernels.testing import LOGIT_KINDS, assert_as_accurate, make_logits

from . import oracles

EXPERTS, HIDDEN, INTERMEDIATE = 3, 5, 7

# What the property tests draw from; test_triton_hypothesis.py draws a few examples of the same.
CAPACITIES = {
    "tokens": st.integers(1, 24),
    "capacity": st.integers(1, 24),
    "kind": st.sampled_from(LOGIT_KINDS),
    "seed": st.integers(0, 99),
}
GROUPS = {
    "groups": st.integers(1, 3),
    "size": st.integers(1, 8),
    "kind": st.sampled_from(LOGIT_KINDS),
    "seed": st.integers(0, 99),
}


def make_plan(kind: str, dtype=torch.float64, tokens: int = 8) -> mk.RoutingPlan:
    if kind == "expert_choice":
        return mk.expert_choice(make_logits(tokens, EXPERTS, dtype=dtype), 1.5, num_groups=2)
    if kind == "token_choice":
        return mk.token_choice(make_logits(tokens, EXPERTS, dtype=dtype), 2)
    assert kind == "empty_expert"
    logits = make_logits(tokens, EXPERTS, "collapsed", dtype=dtype)
    return mk.token_choice(logits, 1)


PLANS = ("expert_choice", "token_choice", "empty_expert")


def make_weights(activation: str, bias: bool, dtype=torch.float64) -> dict[str, torch.Tensor]:
    rows_in = 2 * INTERMEDIATE if activation == "swiglu" else INTERMEDIATE
    weights = {
        "w_in": torch.randn(EXPERTS, rows_in, HIDDEN, dtype=dtype) * 0.5,
        "w_out": torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, dtype=dtype) * 0.5,
    }
    if bias:
        weights["bias_in"] = torch.randn(EXPERTS, rows_in, dtype=dtype) * 0.5
        weights["bias_out"] = torch.randn(EXPERTS, HIDDEN, dtype=dtype) * 0.5
    return {name: tensor.requires_grad_() for name, tensor in weights.items()}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "swiglu"])
@pytest.mark.parametrize("bias", [False, True])
def test_expert_mlp_equals_the_loop_forward_and_backward(kind, activation, bias):
    logits = make_logits(8, EXPERTS, "collapsed" if kind == "empty_expert" else "normal")
    logits = logits.double().requires_grad_()

    def route():
        if kind == "expert_choice":
            return mk.expert_choice(logits, 1.5, num_groups=2)
        return mk.token_choice(logits, 1 if kind == "empty_expert" else 2)

    plan = route()
    x = torch.randn(8, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights = make_weights(activation, bias)
    out = mk.expert_mlp(x, plan, **weights, activation=activation)
    rows = list(zip(plan.expert_of_row.tolist(), plan.token_indices.tolist(), strict=True))
    expected = oracles.moe_output(x, rows, plan.routing_weights, activation=activation, **weights)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(out)
    leaves = [x, logits, *weights.values()]
    got = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    want = torch.autograd.grad(expected, leaves, upstream)
    for name, a, b in zip(["x", "logits", *weights], got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", PLANS)
def test_gradcheck_of_every_stage(kind):
    plan = make_plan(kind)
    x = torch.randn(8, HIDDEN, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(plan.num_rows, HIDDEN, dtype=torch.float64, requires_grad=True)
    w = torch.randn(EXPERTS, 4, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mk.dispatch(x, plan), (x,))
    assert torch.autograd.gradcheck(lambda rows: mk.combine(rows, plan), (rows,))
    for equal in {None, plan.rows_per_expert}:
        assert torch.autograd.gradcheck(
            lambda rows, w, equal=equal: mk.grouped_gemm(
                rows, w, plan.expert_offsets, rows_per_expert=equal
            ),
            (rows, w),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dispatch_copies_bits(dtype):
    plan = make_plan("expert_choice", torch.float32)
    x = torch.randn(8, HIDDEN).to(dtype)
    assert torch.equal(mk.dispatch(x, plan), x[plan.token_indices.long()])


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_expert_mlp_is_as_accurate_as_plain_pytorch(kind, activation, dtype):
    plan = make_plan(kind, torch.float32, tokens=32)
    weights = {n: w.detach().to(dtype) for n, w in make_weights(activation, True).items()}
    x = torch.randn(32, HIDDEN).to(dtype)
    actual_in = [t.clone().requires_grad_() for t in (x, *weights.values())]
    rows = list(zip(plan.expert_of_row.tolist(), plan.token_indices.tolist(), strict=True))

    def call(tensors):
        names = dict(zip(weights, tensors[1:], strict=True))
        return mk.expert_mlp(tensors[0], plan, **names, activation=activation)

    def loop(tensors):
        names = dict(zip(weights, tensors[1:], strict=True))
        routing_weights = plan.routing_weights.to(tensors[0].dtype)
        return oracles.moe_output(tensors[0], rows, routing_weights, activation=activation, **names)

    upstream = torch.randn(32, HIDDEN).to(dtype)
    exact_in = [t.double().requires_grad_() for t in (x, *weights.values())]
    plain_in = [t.clone().requires_grad_() for t in (x, *weights.values())]
    actual, plain, exact = call(actual_in), loop(plain_in), loop(exact_in)
    assert actual.dtype == dtype
    assert_as_accurate(actual, plain, exact)
    grads = zip(
        torch.autograd.grad(actual, actual_in, upstream),
        torch.autograd.grad(plain, plain_in, upstream),
        torch.autograd.grad(exact, exact_in, upstream.double()),
        strict=True,
    )
    for a, p, e in grads:
        assert_as_accurate(a, p, e)


@settings(max_examples=25, deadline=None)
@given(**CAPACITIES)
def test_unchosen_tokens_get_exact_zeros(tokens, capacity, kind, seed):
    torch.manual_seed(seed)
    logits = make_logits(tokens, EXPERTS, kind, seed)
    plan = mk.expert_choice(logits, capacity=min(capacity, tokens))
    weights = {n: w.detach().float() for n, w in make_weights("gelu_tanh", True).items()}
    out = mk.expert_mlp(torch.randn(tokens, HIDDEN), plan, **weights)
    chosen = plan.experts_per_token > 0
    assert torch.equal(out[~chosen], torch.zeros_like(out[~chosen]))
    # A chosen token's output is not zero, unless all its affinities underflowed.
    weight = torch.zeros(tokens).index_add(0, plan.token_indices, plan.routing_weights)
    assert bool((out[weight > 1e-6] != 0).any(dim=1).all())


@settings(max_examples=25, deadline=None)
@given(**GROUPS)
def test_full_capacity_equals_the_dense_softmax_mixture(groups, size, kind, seed):
    torch.manual_seed(seed)
    tokens = groups * size
    logits = make_logits(tokens, EXPERTS, kind, seed, dtype=torch.float64)
    plan = mk.expert_choice(logits, float(EXPERTS), num_groups=groups)
    w = make_weights("gelu", True)
    x = torch.randn(tokens, HIDDEN, dtype=torch.float64)
    h = torch.einsum("efd,td->tef", w["w_in"], x) + w["bias_in"]
    y = torch.einsum("edf,tef->ted", w["w_out"], torch.nn.functional.gelu(h)) + w["bias_out"]
    mixture = torch.einsum("te,ted->td", torch.softmax(logits, -1), y)
    torch.testing.assert_close(mk.expert_mlp(x, plan, **w, activation="gelu"), mixture)


def test_empty_expert_gets_zero_weight_gradients():
    plan = make_plan("empty_expert")
    assert plan.tokens_per_expert.tolist() == [8, 0, 0]
    weights = make_weights("swiglu", True)
    out = mk.expert_mlp(
        torch.randn(8, HIDDEN, dtype=torch.float64), plan, **weights, activation="swiglu"
    )
    for gradient in torch.autograd.grad(out, list(weights.values()), torch.randn_like(out)):
        assert torch.equal(gradient[1:], torch.zeros_like(gradient[1:]))
        assert bool((gradient[0] != 0).any())


@pytest.mark.parametrize("route", ["expert_choice", "token_choice"])
def test_no_tokens_at_all(route):
    logits = torch.zeros(0, EXPERTS, requires_grad=True)
    plan = getattr(mk, route)(logits).validate()
    weights = {
        n: w.detach().float().requires_grad_() for n, w in make_weights("gelu", True).items()
    }
    x = torch.zeros(0, HIDDEN, requires_grad=True)
    out = mk.expert_mlp(x, plan, **weights, activation="gelu")
    assert out.shape == (0, HIDDEN)
    grads = torch.autograd.grad(
        out, [x, *weights.values()], torch.zeros_like(out), allow_unused=True
    )
    for gradient in grads:
        assert gradient is None or bool((gradient == 0).all())
    assert bool(torch.isfinite(mk.load_balance_loss(plan)))


@pytest.mark.parametrize("kind", PLANS)
def test_expanded_and_strided_upstream_gradients(kind):
    plan = make_plan(kind)
    weights = make_weights("gelu_tanh", False)
    x = torch.randn(HIDDEN, 8, dtype=torch.float64).T.requires_grad_()  # strided input
    out = mk.expert_mlp(x, plan, **weights)
    leaves = [x, *weights.values()]
    row = torch.randn(1, HIDDEN, dtype=torch.float64)
    expanded = torch.autograd.grad(out, leaves, row.expand(8, -1), retain_graph=True)
    dense = torch.autograd.grad(out, leaves, row.repeat(8, 1), retain_graph=True)
    strided = torch.autograd.grad(out, leaves, row.repeat(8, 1).T.contiguous().T)
    for a, b, c in zip(expanded, dense, strided, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, b)


def test_ragged_gemm_op_passes_opcheck():
    plan = make_plan("token_choice", torch.float32)
    rows = torch.randn(plan.num_rows, HIDDEN, requires_grad=True)
    w = torch.randn(EXPERTS, 4, HIDDEN, requires_grad=True)
    opcheck(torch.ops.moe_kernels.ragged_gemm.default, (rows, w, plan.expert_offsets))


def test_autocast_runs_products_in_its_dtype_and_returns_the_dtype_of_x():
    plan = make_plan("token_choice", torch.float32)
    weights = {n: w.detach().float() for n, w in make_weights("gelu", True).items()}
    x = torch.randn(8, HIDDEN)
    exact = mk.expert_mlp(x, plan, **weights, activation="gelu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = mk.grouped_gemm(mk.dispatch(x, plan), weights["w_in"], plan.expert_offsets)
        out = mk.expert_mlp(x, plan, **weights, activation="gelu")
    assert product.dtype == torch.bfloat16
    assert out.dtype == torch.float32
    error = (out - exact).abs().max() / exact.abs().max()
    assert 1e-5 < float(error) < 3e-2  # bf16 was used, and nothing worse happened


def test_two_runs_are_equal_bit_for_bit():
    plan = mk.token_choice(make_logits(256, EXPERTS), 2)
    weights = {
        n: w.detach().float().requires_grad_() for n, w in make_weights("swiglu", True).items()
    }
    x = torch.randn(256, HIDDEN, requires_grad=True)
    upstream = torch.randn(256, HIDDEN)
    runs = []
    for _ in range(2):
        out = mk.expert_mlp(x, plan, **weights, activation="swiglu")
        runs.append((out, *torch.autograd.grad(out, [x, *weights.values()], upstream)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_differentiating_twice_is_an_error_and_never_wrong(backend):
    if backend in ("reference", "cuda"):
        pytest.skip("the reference's expert_mlp can be differentiated twice")
    plan = make_plan("token_choice", torch.float32)
    weights = {n: w.detach().float() for n, w in make_weights("gelu", True).items()}
    x = torch.randn(8, HIDDEN, requires_grad=True)
    out = mk.expert_mlp(x, plan, **weights, activation="gelu")
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        (dx.square().sum() + x.square().sum()).backward()


def test_autocast_leaves_the_residual_its_precision():
    plan = make_plan("token_choice", torch.float32)
    weights = {n: torch.zeros_like(w).float() for n, w in make_weights("gelu", True).items()}
    residual = torch.full((8, HIDDEN), 1.001)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mk.expert_mlp(
            torch.randn(8, HIDDEN), plan, **weights, activation="gelu", residual=residual
        )
    assert torch.equal(out, residual)
