"""Expert MLP, rows and grouped products on a GPU: as accurate as PyTorch, the same bits twice."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import moe_kernels as mk

from .gpu_cases import (
    DEVICES,
    ROUTED_BY,
    assert_mlp_accurate,
    draw,
    equal_plan,
    mlp_results,
    mlp_tensors,
    ragged_plan,
    sixteen_bit,
)

PLANS = {"equal": equal_plan, "ragged": ragged_plan}
# Tokens, hidden, inner, experts; "odd" widths are no multiples of 16, so no tensor descriptor fits.
SIZES = {
    "cuda": {"whole": (512, 256, 384, 4), "odd": (300, 130, 75, 4), "narrow": (128, 9, 24, 4)},
    "cpu": {"whole": (12, 16, 32, 3), "odd": (10, 9, 19, 3), "narrow": (8, 3, 5, 3)},
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Every pair of options occurs, not every combination: each compiles some ten kernels of its own.
CASES = (
    ("gelu_tanh", BF16, True, "equal", "whole"),
    ("swiglu", BF16, False, "ragged", "whole"),
    ("gelu", BF16, True, "ragged", "odd"),
    ("swiglu", FP16, True, "equal", "odd"),
    ("gelu_tanh", FP16, False, "ragged", "narrow"),
    ("gelu", FP16, False, "equal", "whole"),
    ("gelu", FP32, False, "equal", "narrow"),
    ("swiglu", FP32, True, "ragged", "whole"),
    ("gelu_tanh", FP32, True, "ragged", "odd"),
)


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    with mk.use_backend("triton"):
        yield


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("activation", "dtype", "bias", "groups", "size"), CASES, ids=str)
def test_results_are_as_accurate_as_plain_pytorch(device, activation, dtype, bias, groups, size):
    if device == "cpu" and dtype == BF16:
        dtype = FP16
    tokens, hidden, inner, experts = SIZES[device][size]
    plan = PLANS[groups](device, tokens, experts)
    tensors = mlp_tensors(plan, hidden, inner, activation, dtype, bias, shared=bias)
    found = assert_mlp_accurate(plan, tensors, activation)
    if groups == "ragged":  # the expert without rows: zeros in memory that held NaN
        for name in ("w_in", "w_out"):
            assert not bool(found[name][1].any()), name
    again = mlp_results(plan, tensors, torch.ones_like(tensors["x"]), activation)
    twice = mlp_results(plan, tensors, torch.ones_like(tensors["x"]), activation)
    assert all(torch.equal(again[name], twice[name]) for name in again)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("activation", "groups", "sizes"),
    [("swiglu", "ragged", (4096, 1152, 4608, 8)), ("gelu_tanh", "equal", (8192, 1152, 4608, 16))],
)
def test_large_layers_are_as_accurate_as_plain_pytorch(activation, groups, sizes):
    tokens, hidden, inner, experts = sizes
    plan = PLANS[groups]("cuda", tokens, experts)
    bias = activation != "swiglu"
    assert_mlp_accurate(plan, mlp_tensors(plan, hidden, inner, activation, BF16, bias), activation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_no_tokens_give_empty_rows_and_zero_gradients(device, activation):
    plan = mk.token_choice(torch.zeros(0, 3, device=device), 2)
    tensors = mlp_tensors(plan, 16, 32, activation, sixteen_bit(device), bias=True)
    found = mlp_results(plan, tensors, torch.zeros_like(tensors["x"]), activation)
    assert found["out"].shape == (0, 16)
    assert not any(bool(found[name].any()) for name in ("w_in", "w_out", "bias_in", "bias_out"))


@pytest.mark.parametrize("device", DEVICES)
def test_all_tokens_may_go_to_one_expert(device):
    tokens, hidden, inner, experts = SIZES[device]["whole"]
    logits = draw(device, tokens, experts)
    logits[:, 2] = 40.0
    plan = mk.token_choice(logits, 1)
    dtype = sixteen_bit(device)
    assert_mlp_accurate(plan, mlp_tensors(plan, hidden, inner, "swiglu", dtype), "swiglu")


def gathered(x: Tensor, plan: mk.RoutingPlan) -> Tensor:
    return x[plan.token_indices.long()]


def scattered(rows: Tensor, plan: mk.RoutingPlan) -> Tensor:
    weighted = rows.double() * plan.routing_weights.double().unsqueeze(1)
    out = weighted.new_zeros(plan.num_tokens, rows.shape[1])
    return out.index_add(0, plan.token_indices.long(), weighted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", PLANS)
@pytest.mark.parametrize("moved_by", ROUTED_BY)
def test_rows_are_moved_exactly_and_combined_accurately(device, groups, moved_by):
    for tokens, hidden in ((1000, 1152), (77, 33)) if device == "cuda" else ((10, 9),):
        plan = PLANS[groups](device, tokens - tokens % 2, 4)
        x = draw(device, plan.num_tokens, hidden, dtype=sixteen_bit(device)).requires_grad_()
        rows = mk.dispatch(x, plan, backend=moved_by)
        assert torch.equal(rows, gathered(x, plan))
        out = mk.combine(rows.detach(), plan, backend=moved_by)
        expected = scattered(rows.detach(), plan)
        error = (out.double() - expected).abs().max() / expected.abs().max()
        assert float(error) < 4e-3  # one rounding to 16 bits
        upstream = torch.randn_like(rows)
        (dx,) = torch.autograd.grad(rows, x, upstream)
        exact = torch.zeros_like(x, dtype=torch.float64)
        exact = exact.index_add(0, plan.token_indices.long(), upstream.double())
        assert float((dx.double() - exact).abs().max() / exact.abs().max()) < 4e-3
