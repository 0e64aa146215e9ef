"""Without gradients the CPU kernels keep nothing for a backward, and give the same bits."""

import pytest
import torch

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.ops import experts, parts

from .expert_parts import split

if (reason := BACKENDS["cpu"].why_not("expert_mlp", "cpu")) is not None:
    pytest.skip(f"the cpu backend {reason}", allow_module_level=True)

TOKENS, EXPERTS, HIDDEN, INNER = 96, 4, 24, 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("listed", [False, True], ids=["stacked", "listed"])
def test_inference_gives_the_bits_of_training(dtype, activation, listed):
    halves = 2 if activation == "swiglu" else 1
    shapes = [(EXPERTS, halves * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)]
    shapes += [(EXPERTS, halves * INNER), (EXPERTS, HIDDEN)]
    w_in, w_out, bias_in, bias_out = (
        (0.3 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes
    )
    weights = {"w_in": w_in, "w_out": w_out, "bias_in": bias_in, "bias_out": bias_out}
    if listed:
        weights = {
            name: split(w, halves if name.endswith("in") else 1) for name, w in weights.items()
        }
    x = torch.randn(TOKENS, HIDDEN).to(dtype)
    plan = mk.token_choice(torch.randn(TOKENS, EXPERTS), 2, backend="cpu")

    def run():
        return mk.expert_mlp(x, plan, **weights, activation=activation, backend="cpu")

    trained = run()
    assert trained.requires_grad
    with torch.no_grad():
        inferred = run()
    assert torch.equal(inferred, trained)


@pytest.mark.parametrize("listed", [False, True], ids=["stacked", "listed"])
def test_inference_makes_no_h(listed):
    plan = mk.token_choice(torch.randn(TOKENS, EXPERTS), 2, backend="cpu")
    w_in, w_out = torch.randn(EXPERTS, INNER, HIDDEN), torch.randn(EXPERTS, HIDDEN, INNER)
    indices = (plan.token_indices, plan.row_indices, plan.row_offsets, plan.expert_offsets)
    x, settings = torch.randn(TOKENS, HIDDEN), (*indices, 0, "gelu")
    operator, operands = experts.expert_mlp, (w_in, w_out, None, None)
    if listed:
        operator = parts.expert_mlp_parts
        operands = (split(w_in, 1), split(w_out, 1), [], [])
    out, h = operator["cpu"](x, plan.routing_weights, *operands, None, None, *settings)
    assert (tuple(out.shape), h.numel()) == (tuple(x.shape), 0)
    x.requires_grad_()
    _, h = operator["cpu"](x, plan.routing_weights, *operands, None, None, *settings)
    assert tuple(h.shape) == (plan.num_rows, INNER)
