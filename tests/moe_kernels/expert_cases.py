"""Inputs of the expert MLP, and its results by name on any backend, for the tests of Triton."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.testing import assert_as_accurate, make_logits

ACTIVATIONS = ("gelu_tanh", "gelu", "swiglu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = ("w_in", "w_out", "bias_in", "bias_out")
TERMS = ("shared", "residual")

Tensors = dict[str, Tensor]


def ragged_plan(rows: tuple[int, ...]) -> mk.RoutingPlan:
    """Every token takes one expert, in a mixed order; expert e is taken by ``rows[e]`` tokens."""
    best = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    best = best[torch.randperm(best.shape[0])]
    preferred = torch.nn.functional.one_hot(best, len(rows)) * 3.0
    plan = mk.token_choice(preferred + torch.rand(preferred.shape), 1, backend="reference")
    assert plan.tokens_per_expert.tolist() == list(rows)
    return plan


def equal_plan(tokens: int, experts: int, factor: float = 1.5, groups: int = 2) -> mk.RoutingPlan:
    """Expert choice: equal groups."""
    logits = make_logits(tokens, experts)
    return mk.expert_choice(logits, factor, num_groups=groups, backend="reference")


def make_tensors(
    plan: mk.RoutingPlan,
    hidden: int,
    inner: int,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    terms: tuple[str, ...] = (),
) -> Tensors:
    """x, routing weights, matrices, and biases, shared and residual if asked for."""
    experts, into = plan.num_experts, 2 * inner if activation == "swiglu" else inner
    shapes: dict[str, tuple[int, ...]] = {
        "x": (plan.num_tokens, hidden),
        "w_in": (experts, into, hidden),
        "w_out": (experts, hidden, inner),
    }
    if bias:
        shapes |= {"bias_in": (experts, into), "bias_out": (experts, hidden)}
    shapes |= dict.fromkeys(terms, (plan.num_tokens, hidden))
    tensors = {name: (torch.randn(shape) * 0.3).to(dtype) for name, shape in shapes.items()}
    return tensors | {"routing_weights": plan.routing_weights.detach().clone()}


def results(
    plan: mk.RoutingPlan,
    tensors: Tensors,
    upstream: Tensor,
    activation: str,
    backend: str = "triton",
    dtype: torch.dtype | None = None,
    make: Callable[[Tensor], Tensor] = lambda tensor: tensor.detach().clone(),
) -> Tensors:
    """The output as ``"out"``, and the gradient of every tensor by its name.

    Args:
        plan: whose routing weights those of ``tensors`` replace.
        tensors: of ``make_tensors``.
        upstream: gradient of the output.
        activation: of the experts.
        backend: that computes.
        dtype: to compute in; ``None`` takes the tensors as they are.
        make: the leaf that is used for a tensor.
    """
    leaves = {}
    for name, tensor in tensors.items():
        wide = dtype if dtype == torch.float64 else torch.float32
        to = tensor.dtype if dtype is None else wide if name == "routing_weights" else dtype
        leaves[name] = make(tensor.to(to)).requires_grad_()
    plan = dataclasses.replace(plan, routing_weights=leaves["routing_weights"])
    named = {name: leaves[name] for name in (*WEIGHTS, *TERMS) if name in leaves}
    out = mk.expert_mlp(leaves["x"], plan, **named, activation=activation, backend=backend)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_accurate(actual: Tensors, plan: mk.RoutingPlan, tensors: Tensors, *case: object) -> None:
    """Each result errs at most twice as much as plain PyTorch in the same dtype; ``case`` is what
    ``results`` takes after the tensors."""
    upstream, activation = case
    dtype = tensors["x"].dtype
    plain = results(plan, tensors, upstream, activation, "reference", dtype)
    exact = results(plan, tensors, upstream, activation, "reference", torch.float64)
    for name, result in actual.items():
        assert result.dtype == plain[name].dtype, name
        assert_as_accurate(result, plain[name], exact[name])


def assert_same_bits(actual: Tensors, expected: Tensors) -> None:
    """Each result is equal to the bit; NaN equals NaN."""
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        torch.testing.assert_close(
            result,
            expected[name],
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
