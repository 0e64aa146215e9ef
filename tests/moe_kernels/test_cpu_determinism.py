"""Equal bits for any number of threads, and equal results on every instruction set."""

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.testing import assert_as_accurate, make_logits

from . import oracles

if (reason := BACKENDS["cpu"].why_not("expert_mlp", "cpu")) is not None:
    pytest.skip(f"the cpu backend {reason}", allow_module_level=True)
native = importlib.import_module("moe_kernels._cpu")

IMAGES, SIZE, EXPERTS, HIDDEN, INTERMEDIATE = 4, 512, 16, 64, 96
ROUTERS = ("token_choice", "per_image", "whole_batch")
ACTIVATIONS = ("gelu_tanh", "gelu", "swiglu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    with mk.use_backend("cpu"):
        yield "cpu"


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def restored_isa() -> Iterator[None]:
    isa = native.isa()
    yield
    native.use_isa(isa)


def route(router: str, logits: Tensor) -> mk.RoutingPlan:
    if router == "token_choice":
        return mk.token_choice(logits, 2, num_groups=IMAGES, normalize="per_token")
    groups = IMAGES if router == "per_image" else 1
    return mk.expert_choice(logits, num_groups=groups, normalize="per_token")


def make_weights(
    activation: str, dtype: torch.dtype, hidden: int, intermediate: int
) -> dict[str, Tensor]:
    into = 2 * intermediate if activation == "swiglu" else intermediate
    weights = {
        "w_in": torch.randn(EXPERTS, into, hidden) * 0.2,
        "w_out": torch.randn(EXPERTS, hidden, intermediate) * 0.2,
        "bias_in": torch.randn(EXPERTS, into) * 0.2,
        "bias_out": torch.randn(EXPERTS, hidden) * 0.2,
    }
    return {name: w.to(dtype).requires_grad_() for name, w in weights.items()}


def layer(router: str, activation: str, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Everything that one step of a layer computes: indices, output, losses, gradients."""
    logits, x, *weights = leaves
    names = ("w_in", "w_out", "bias_in", "bias_out")
    plan = route(router, logits)
    out = mk.expert_mlp(x, plan, **dict(zip(names, weights, strict=True)), activation=activation)
    rows = mk.dispatch(x, plan)
    again = mk.combine(mk.grouped_gemm(rows, weights[0], plan.expert_offsets), plan)
    losses = [
        mk.load_balance_loss(plan),
        mk.load_balance_loss(plan, per_sequence=True),
        mk.router_z_loss(plan),
        mk.router_similarity_loss(plan),
    ]
    gradients = torch.autograd.grad(
        [out, again, *losses],
        leaves,
        [upstream, again.detach().cos(), *(torch.full_like(loss, 0.7) for loss in losses)],
    )
    indices = [plan.token_indices, plan.row_indices, plan.row_offsets, plan.expert_offsets]
    return [*indices, plan.routing_weights, *plan.stats, out, again, *losses, *gradients]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    ("dtype", "activation"), [(torch.float32, "swiglu"), (torch.bfloat16, "gelu_tanh")], ids=str
)
def test_bits_do_not_depend_on_threads_or_on_the_run(router, dtype, activation, restored_threads):
    logits = make_logits(IMAGES * SIZE, EXPERTS).requires_grad_()
    x = torch.randn(IMAGES * SIZE, HIDDEN).to(dtype).requires_grad_()
    weights = make_weights(activation, dtype, HIDDEN, INTERMEDIATE)
    upstream = torch.randn(IMAGES * SIZE, HIDDEN).to(dtype)
    leaves = [logits, x, *weights.values()]
    torch.set_num_threads(1)
    first = layer(router, activation, leaves, upstream)
    for threads in (1, 2, 2, 3, 3, 5, 5):
        torch.set_num_threads(threads)
        again = layer(router, activation, leaves, upstream)
        for place, (a, b) in enumerate(zip(again, first, strict=True)):
            assert torch.equal(a, b), f"result {place} differs with {threads} threads"


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", ["normal", "ties", "extreme"])
def test_every_isa_selects_by_its_own_affinities(isa, router, kind, restored_isa):
    native.use_isa(isa)
    assert native.isa() == isa
    logits = make_logits(IMAGES * 37, EXPERTS, kind)
    plan = route(router, logits).validate()
    exact = torch.softmax(logits.double(), -1)
    assert_as_accurate(plan.router_probs, torch.softmax(logits, -1), exact)
    rows = list(zip(plan.expert_of_row.tolist(), plan.token_indices.tolist(), strict=True))
    if router == "token_choice":
        assert rows == oracles.token_choice_rows(plan.router_probs, 2)
    else:
        assert plan.capacity is not None
        expected = oracles.expert_choice_rows(plan.router_probs, plan.capacity, plan.num_groups)
        assert rows == expected


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa_is_as_accurate_as_plain_pytorch(isa, activation, dtype, restored_isa):
    native.use_isa(isa)
    tokens, hidden, intermediate = 70, 21, 37
    plan = mk.token_choice(make_logits(tokens, EXPERTS), 2)
    x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    weights = make_weights(activation, dtype, hidden, intermediate)
    upstream = torch.randn(tokens, hidden).to(dtype)

    def run(name: str, to: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(to).requires_grad_() for t in (x, *weights.values())]
        named = dict(zip(weights, leaves[1:], strict=True))
        out = mk.expert_mlp(leaves[0], plan, **named, activation=activation, backend=name)
        return [out, *torch.autograd.grad(out, leaves, upstream.to(to))]

    results = (run("cpu", dtype), run("reference", dtype), run("reference", torch.float64))
    for actual, plain, exact in zip(*results, strict=True):
        assert_as_accurate(actual, plain, exact)


def test_isas_agree_on_routing_gradients_and_losses(restored_isa):
    logits = make_logits(IMAGES * 37, EXPERTS, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(IMAGES * 37 * 2, dtype=torch.float64)
    results = []
    for isa in native.isas():
        native.use_isa(isa)
        plan = route("token_choice", logits)
        losses = [mk.load_balance_loss(plan), mk.router_z_loss(plan)]
        losses.append(mk.router_similarity_loss(plan))
        (gradient,) = torch.autograd.grad(
            [plan.routing_weights, *losses],
            logits,
            [upstream, *(torch.full_like(loss, 1.3) for loss in losses)],
        )
        results.append((plan.token_indices, plan.routing_weights, *losses, gradient))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_an_unknown_isa_is_refused():
    before = native.isa()
    with pytest.raises(ValueError, match="lacks the instruction set 'sse9'"):
        native.use_isa("sse9")
    assert native.isa() == before
