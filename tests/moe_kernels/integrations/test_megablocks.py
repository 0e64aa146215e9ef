"""Weights of megablocks' dMoE and back.

The state dicts have the keys and shapes of megablocks 0.10; the functions are computed here.
"""

import types
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_kernels as mk
from moe_kernels.integrations.megablocks import from_megablocks, to_megablocks
from moe_kernels.testing import assert_as_accurate

from .parity import backend

__all__ = ["backend"]

HIDDEN, INNER, SHARED, EXPERTS, TOP_K = 6, 10, 4, 3, 2


def make_state(
    gated: bool = False,
    bias: bool = True,
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The state dict of a dMoE, in megablocks' order."""
    shapes: dict[str, tuple[int, ...]] = {"router.layer.weight": (EXPERTS, HIDDEN)}
    if bias:
        shapes["experts.bias"] = (HIDDEN,)
    shapes["experts.mlp.w1"] = (EXPERTS * INNER, HIDDEN)
    shapes["experts.mlp.w2"] = (EXPERTS * INNER, HIDDEN)
    if gated:
        shapes["experts.mlp.v1"] = (EXPERTS * INNER, HIDDEN)
    if shared:
        sizes = {"up_proj": (SHARED, HIDDEN), "down_proj": (HIDDEN, SHARED)}
        if gated:
            sizes["gate_proj"] = (SHARED, HIDDEN)
        for name, size in sizes.items():
            shapes[f"shared_expert.{name}.weight"] = size
            if bias:
                shapes[f"shared_expert.{name}.bias"] = size[:1]
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


class Module(nn.Module):
    """Parameters under dotted names, and megablocks' ``experts.args``."""

    def __init__(self, state: dict[str, Tensor], **args: Any) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, nn.Parameter(tensor))
        standard = {
            "activation_fn": partial(F.gelu, approximate="tanh"),
            "mlp_type": "mlp",
            "moe_normalize_expert_weights": None,
            "moe_expert_model_parallelism": False,
            "shared_expert_weighted_sum": False,
        }
        self.experts.args = types.SimpleNamespace(**(standard | args))


def dmoe(state: dict[str, Tensor], x: Tensor, gated: bool) -> Tensor:
    """What a dMoE computes with these weights, an expert and a token at a time."""
    scores = (x @ state["router.layer.weight"].T).softmax(-1)
    weights, index = scores.topk(TOP_K)
    rows = {name: state[f"experts.mlp.{name}"] for name in ("w1", "w2")}
    if gated:
        rows["v1"] = state["experts.mlp.v1"]
    activation = F.silu if gated else partial(F.gelu, approximate="tanh")
    outs = []
    for token in range(x.shape[0]):
        out = torch.zeros_like(x[token])
        for k in range(TOP_K):
            first = int(index[token, k]) * INNER
            mine = {name: matrix[first : first + INNER] for name, matrix in rows.items()}
            h = activation(mine["w1"] @ x[token])
            if gated:
                h = h * (mine["v1"] @ x[token])
            out = out + weights[token, k] * (h @ mine["w2"])
        outs.append(out)
    out = torch.stack(outs)
    if "shared_expert.up_proj.weight" in state:

        def linear(name: str, value: Tensor) -> Tensor:
            weight = state[f"shared_expert.{name}.weight"]
            return F.linear(value, weight, state.get(f"shared_expert.{name}.bias"))

        up = linear("up_proj", x)
        h = activation(linear("gate_proj", x)) * up if gated else activation(up)
        out = out + linear("down_proj", h)
    return out + state["experts.bias"] if "experts.bias" in state else out


def make_layer(gated: bool, bias: bool, shared: bool) -> mk.MoE:
    return mk.MoE(
        HIDDEN,
        INNER,
        EXPERTS,
        mk.TokenChoiceRouter(HIDDEN, EXPERTS, TOP_K),
        activation="swiglu" if gated else "gelu_tanh",
        bias=bias,
        shared_intermediate_size=SHARED if shared else 0,
    )


CASES = [(g, b, s) for g in (False, True) for b in (False, True) for s in (False, True)]


@pytest.mark.parametrize(("gated", "bias", "shared"), CASES)
def test_the_layer_computes_what_the_dmoe_computes(gated, bias, shared):
    state = make_state(gated, bias, shared)
    converted = from_megablocks(state)
    layer = make_layer(gated, bias and shared, shared)
    layer.load_state_dict(converted.layer, strict=True)
    assert (converted.output_bias is not None) == bias
    assert converted.activation is None
    x = torch.randn(2, 9, HIDDEN)
    out, _ = layer(x)
    if converted.output_bias is not None:
        out = out + converted.output_bias
    tokens = x.flatten(0, 1)
    plain = dmoe(state, tokens, gated)
    exact = dmoe({name: t.double() for name, t in state.items()}, tokens.double(), gated)
    assert_as_accurate(out.detach().flatten(0, 1), plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("gated", "bias", "shared"), CASES)
def test_there_and_back_to_the_bit(gated, bias, shared, dtype):
    state = make_state(gated, bias, shared, dtype)
    converted = from_megablocks(state)
    back = to_megablocks(converted.layer, converted.output_bias)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name
        assert back[name].is_contiguous()


@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_of_ours_there_and_back(gated):
    layer = make_layer(gated, bias=False, shared=True)
    state = to_megablocks(layer)
    assert set(state) == set(make_state(gated, bias=False, shared=True))
    back = from_megablocks(state)
    assert back.output_bias is None
    assert back.layer.keys() == layer.state_dict().keys()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(back.layer[name], tensor), name


def test_the_result_shares_no_memory_with_the_source():
    state = make_state(gated=True, shared=True)
    before = {name: tensor.clone() for name, tensor in state.items()}
    converted = from_megablocks(state)
    for tensor in to_megablocks(converted.layer, converted.output_bias).values():
        tensor.zero_()
    for tensor in (*converted.layer.values(), converted.output_bias):
        tensor.zero_()
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("gated", "activation_fn", "expected"),
    [
        (False, partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (False, F.gelu, "gelu"),
        (True, F.silu, "swiglu"),
        (True, nn.SiLU(), "swiglu"),
    ],
)
def test_a_module_tells_its_activation(gated, activation_fn, expected):
    state = make_state(gated)
    args = {"activation_fn": activation_fn, "mlp_type": "glu" if gated else "mlp"}
    converted = from_megablocks(Module(state, **args))
    assert converted.activation == expected
    for name, tensor in from_megablocks(state).layer.items():
        assert torch.equal(converted.layer[name], tensor)


@pytest.mark.parametrize(
    ("gated", "args", "message"),
    [
        (True, {"mlp_type": "glu"}, "in an GLU; expected SiLU"),
        (False, {"activation_fn": F.relu}, "in an MLP; expected GELU"),
        (False, {"moe_expert_model_parallelism": True}, "gather the weights of all ranks"),
        (False, {"shared_expert_weighted_sum": True}, "with weight 1"),
        (False, {"moe_normalize_expert_weights": 2}, "is 2; expected None or 1"),
    ],
)
def test_a_module_that_a_layer_cannot_compute_is_refused(gated, args, message):
    with pytest.raises(ValueError, match=message):
        from_megablocks(Module(make_state(gated), **args))


def without(name: str) -> dict[str, Tensor]:
    state = make_state(gated=True, shared=True)
    del state[name]
    return state


def replaced(name: str, *shape: int) -> dict[str, Tensor]:
    return make_state(gated=True, shared=True) | {name: torch.randn(shape)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without("router.layer.weight"), "router.layer.weight is missing among the keys experts"),
        (without("experts.mlp.w2"), "experts.mlp.w2 is missing"),
        (without("experts.mlp.v1"), "shared_expert.gate_proj.bias, shared_expert.gate_proj.weight"),
        (without("shared_expert.down_proj.bias"), "shared_expert.down_proj.bias is missing"),
        (without("shared_expert.up_proj.weight"), "not among the weights of a dMoE"),
        (replaced("experts.mlp.w1", 31, HIDDEN), r"w1 has shape \(31, 6\); expected a multiple"),
        (
            replaced("experts.mlp.w1", 3, HIDDEN, INNER),
            r"w1 has shape \(3, 6, 10\); expected \(num",
        ),
        (replaced("experts.mlp.v1", 27, HIDDEN), r"v1 has shape \(27, 6\); expected \(30, 6\)"),
        (replaced("experts.bias", 5), r"experts.bias has shape \(5,\); expected \(6,\)"),
        (replaced("shared_expert.down_proj.weight", 6, 5), r"expected \(6, 4\)"),
        (replaced("shared_expert.gate_proj.weight", 5, 6), r"expected \(4, 6\)"),
        (replaced("experts.mlp.w3", 1), "experts.mlp.w3: not among the weights of a dMoE"),
        (replaced("blocks.0.ffn.router.layer.weight", 1), "blocks.0.ffn.router.layer.weight: not"),
    ],
)
def test_states_that_do_not_fit_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        from_megablocks(state)


def test_a_module_that_is_no_dmoe_is_refused():
    with pytest.raises(ValueError, match=r"Linear without experts\.args"):
        from_megablocks(nn.Linear(2, 2))


def test_biases_of_single_experts_do_not_fit_a_dmoe():
    layer = make_layer(gated=False, bias=True, shared=False)
    to_megablocks(layer)  # zeros are no biases
    nn.init.ones_(layer.experts.up_proj_bias)
    with pytest.raises(ValueError, match=r"experts\.up_proj_bias is not zero"):
        to_megablocks(layer)


def test_layers_that_do_not_fit_a_dmoe_are_refused():
    layer = make_layer(gated=True, bias=False, shared=False)
    with pytest.raises(ValueError, match=r"output_bias has shape \(5,\); expected \(6,\)"):
        to_megablocks(layer, torch.zeros(5))
    state = layer.state_dict()
    with pytest.raises(ValueError, match=r"gate_up_proj has shape \(3, 19, 6\); expected"):
        to_megablocks(state | {"experts.gate_up_proj": torch.randn(3, 19, HIDDEN)})
    with pytest.raises(ValueError, match=r"router\.selection_bias: not among"):
        to_megablocks(state | {"router.selection_bias": torch.zeros(EXPERTS)})
    with pytest.raises(ValueError, match=r"router\.weight is missing"):
        to_megablocks(layer.experts)
