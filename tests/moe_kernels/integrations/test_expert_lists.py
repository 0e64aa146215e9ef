"""The expert MLP with a tensor for each expert, next to each other in memory or not."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_kernels as mk
from moe_kernels.integrations.packing import pack

from ..expert_cases import make_tensors, ragged_plan
from .families import HIDREAM
from .parity import backend, on_backends, run

__all__ = ["backend"]

HIDDEN, INNER = 6, 10


def lists_of(tensors: dict[str, Tensor], halves: bool, packed: bool) -> dict[str, Any]:
    """Weights and biases as leaves, a list for each; with ``halves`` gate and up apart."""
    found: dict[str, Any] = {}
    for name, stacked in tensors.items():
        parts = list(stacked.unbind(0))
        if halves and name.endswith("in"):
            parts = [half for part in parts for half in part.chunk(2)]
        found[name] = [nn.Parameter(part.clone()) for part in parts]
        if packed:
            assert pack(found[name]) is None
    return found


def make_case(activation: str, bias: bool, dtype: torch.dtype) -> tuple[Any, Tensor, Any, Any]:
    plan = ragged_plan((3, 0, 5, 1))
    tensors = make_tensors(plan, HIDDEN, INNER, activation, dtype, bias=bias)
    x, weights = tensors.pop("x"), tensors.pop("routing_weights")
    plan = dataclasses.replace(plan, routing_weights=weights.requires_grad_())
    return plan, x, tensors, torch.randn(plan.num_tokens, HIDDEN).to(dtype)


@pytest.mark.parametrize("served_by", on_backends("reference", "cpu", "triton"))
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize(
    ("activation", "bias", "halves"),
    [("swiglu", True, True), ("swiglu", False, False), ("gelu", True, False)],
    ids=["gate and up apart", "gate above up", "gelu"],
)
def test_lists_give_the_numbers_of_stacked_weights(activation, bias, halves, packed, served_by):
    dtype = torch.bfloat16 if served_by == "cpu" and bias else torch.float32
    plan, x, tensors, upstream = make_case(activation, bias, dtype)
    stacked = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    lists = lists_of({k: t.detach() for k, t in tensors.items()}, halves, packed)
    found = []
    for weights in (stacked, lists):
        leaf = x.clone().requires_grad_()
        out = mk.expert_mlp(leaf, plan, **weights, activation=activation, backend=served_by)
        leaves = [leaf, plan.routing_weights]
        for value in weights.values():
            leaves += value if isinstance(value, list) else [value]
        found.append([out, *torch.autograd.grad(out, leaves, upstream)])
    expected, actual = found
    for wanted, result in zip(expected[:3], actual[:3], strict=True):
        assert torch.equal(result, wanted)
    at = 3
    for wanted, parts in zip(expected[3:], lists.values(), strict=True):
        gradients = actual[at : at + len(parts)]
        at += len(parts)
        assert all(g.dtype == dtype for g in gradients)
        assert torch.equal(torch.cat(gradients).view_as(wanted), wanted)


@pytest.mark.parametrize("served_by", on_backends("cpu", "triton"))
def test_packed_weights_are_not_copied(served_by, monkeypatch):
    plan, x, tensors, upstream = make_case("swiglu", True, torch.float32)
    packed, apart = (lists_of(tensors, True, packed) for packed in (True, False))

    def fail(*args, **kwargs):
        raise AssertionError("stacked")

    monkeypatch.setattr(torch, "cat", fail)
    mk.expert_mlp(x, plan, **packed, activation="swiglu", backend=served_by).backward(upstream)
    with pytest.raises(AssertionError, match="stacked"):
        mk.expert_mlp(x, plan, **apart, activation="swiglu", backend=served_by)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize("served_by", on_backends("cpu"))
def test_gradcheck(served_by, packed):
    plan, x, tensors, _ = make_case("swiglu", True, torch.float64)
    lists = lists_of(tensors, True, packed)
    leaves = [leaf for parts in lists.values() for leaf in parts]

    def call(x: Tensor, weights: Tensor, *flat: Tensor) -> Tensor:
        given, at = {}, 0
        for name, parts in lists.items():
            given[name] = list(flat[at : at + len(parts)])
            at += len(parts)
        routed = dataclasses.replace(plan, routing_weights=weights)
        return mk.expert_mlp(x, routed, **given, activation="swiglu", backend=served_by)

    weights = plan.routing_weights.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), weights, *leaves))


@pytest.mark.parametrize("served_by", on_backends("reference", "cpu", "triton"))
def test_backward_twice_through_one_graph(served_by):
    plan, x, tensors, upstream = make_case("swiglu", True, torch.float32)
    lists = lists_of(tensors, True, True)
    leaves = [leaf for parts in lists.values() for leaf in parts]
    out = mk.expert_mlp(x, plan, **lists, activation="swiglu", backend=served_by)
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(out, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradients_of_some_parts_only():
    plan, x, tensors, upstream = make_case("swiglu", False, torch.float32)
    lists = lists_of(tensors, True, True)
    everything = torch.autograd.grad(
        mk.expert_mlp(x, plan, **lists, activation="swiglu"), lists["w_in"], upstream
    )
    for i, part in enumerate(lists["w_in"]):
        part.requires_grad_(i in (1, 6))
    mk.expert_mlp(x, plan, **lists, activation="swiglu").backward(upstream)
    for i, (part, wanted) in enumerate(zip(lists["w_in"], everything, strict=True)):
        assert part.grad is None if i not in (1, 6) else torch.equal(part.grad, wanted)


def test_gradients_are_parts_of_one_that_do_not_disturb_each_other():
    """Scaling, clipping and setting to zero work in place on each."""
    block = HIDREAM.make()
    inputs = HIDREAM.inputs()
    mk.apply(block)
    expected = run(block, inputs)
    out = block(*inputs)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    first = {name: p.grad.clone() for name, p in block.named_parameters()}
    block.experts[1].w1.weight.grad.zero_()
    nn.utils.clip_grad_norm_(block.experts[2].parameters(), 1e-3)
    for name, parameter in block.named_parameters():
        if name == "experts.1.w1.weight":
            assert not parameter.grad.any()
        elif not name.startswith("experts.2."):
            assert torch.equal(parameter.grad, first[name]), name
    block.zero_grad(set_to_none=False)
    block(*inputs).backward(upstream)
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter.grad, first[name]), name
    block(*inputs).backward(upstream)  # a second one adds up
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * first[name])
    assert torch.equal(run(block, inputs)["out"], expected["out"])


def test_a_weight_changed_between_forward_and_backward_is_noticed():
    block = HIDREAM.make()
    mk.apply(block)
    out = block(*HIDREAM.inputs())
    with torch.no_grad():
        block.experts[1].w2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(torch.randn_like(out))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(w_out=torch.stack(w["w_out"])), "w_in is a list and w_out is not"),
        (lambda w: w.update(w_in=w["w_in"][:5]), r"w_in is a list of 5 tensors; expected 4"),
        (lambda w: w["w_out"].pop(), r"w_out is a list of 3 tensors; expected 4"),
        (lambda w: w.update(bias_in=w["bias_in"][:4]), "bias_in has 4 tensors and w_in 8"),
        (lambda w: w["w_in"].__setitem__(3, torch.zeros(3, 6)), r"w_in\[3\] has shape \(3, 6\)"),
        (
            lambda w: w["w_out"].__setitem__(2, w["w_out"][2].double()),
            r"w_out\[2\] is torch.float64 and w_out\[0\] is torch.float32",
        ),
        (
            lambda w: w.update(w_out=[part.double() for part in w["w_out"]]),
            "w_out is torch.float64 and x is torch.float32",
        ),
    ],
    ids=["mixed", "count", "missing", "biases", "shape", "dtypes", "dtype"],
)
def test_lists_that_do_not_fit(change, message):
    plan, x, tensors, _ = make_case("swiglu", True, torch.float32)
    lists = lists_of(tensors, True, False)
    change(lists)
    with pytest.raises(ValueError, match=message):
        mk.expert_mlp(x, plan, **lists, activation="swiglu")
