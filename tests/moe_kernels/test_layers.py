"""Modules: shapes, groups, state dicts, autocast, compile and checkpointing."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import moe_kernels as mk
from moe_kernels.testing import relative_error


def make_layer(kind: str, activation: str = "gelu_tanh", **options) -> mk.MoE:
    router = (
        mk.ExpertChoiceRouter(8, 4, **options)
        if kind == "expert"
        else mk.TokenChoiceRouter(8, 4, 2, **options)
    )
    return mk.MoE(8, 12, 4, router, activation, bias=True, shared_intermediate_size=6)


def gradients(layer: mk.MoE, call, x: torch.Tensor, upstream: torch.Tensor):
    out, plan = call(x)
    loss = (out * upstream).sum() + mk.load_balance_loss(plan) + 0.1 * mk.router_z_loss(plan)
    return out, torch.autograd.grad(loss, [x, *layer.parameters()])


@pytest.mark.parametrize("kind", ["expert", "token"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "swiglu"])
def test_layer_is_route_then_experts_plus_shared(kind, activation):
    layer = make_layer(kind, activation)
    x = torch.randn(3, 16, 8)
    out, plan = layer(x)
    plan.validate()
    experts = layer.experts(x.flatten(0, 1), plan).view_as(x)
    torch.testing.assert_close(out, experts + layer.shared_expert(x))
    assert plan.num_groups == 3


@pytest.mark.parametrize(("group", "groups"), [("image", 4), ("batch", 1), (32, 2), (8, 8)])
def test_groups(group, groups):
    layer = make_layer("expert", group=group)
    _, plan = layer(torch.randn(4, 16, 8))
    assert plan.validate().num_groups == groups


def test_an_image_does_not_depend_on_its_batch_by_default():
    layer = make_layer("expert")
    x = torch.randn(5, 16, 8)
    whole, _ = layer(x)
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted, _ = layer(x[order])
    torch.testing.assert_close(permuted, whole[order])
    for i in range(5):
        alone, _ = layer(x[i : i + 1])
        torch.testing.assert_close(alone[0], whole[i])
    pooled, _ = make_layer("expert", group="batch")(x)
    assert pooled.shape == x.shape


def test_state_dict_names_and_deepcopy():
    layer = make_layer("token", "swiglu")
    assert set(layer.state_dict()) == {
        "router.weight",
        "experts.gate_up_proj",
        "experts.gate_up_proj_bias",
        "experts.down_proj",
        "experts.down_proj_bias",
        "shared_expert.gate_up_proj.weight",
        "shared_expert.gate_up_proj.bias",
        "shared_expert.down_proj.weight",
        "shared_expert.down_proj.bias",
    }
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 16, 8)
    assert torch.equal(twin(x)[0], layer(x)[0])
    with torch.no_grad():
        twin.experts.down_proj.mul_(2)
    assert not torch.equal(twin(x)[0], layer(x)[0])


def test_meta_device_and_dtype():
    layer = mk.MoE(8, 12, 4, activation="swiglu", bias=True, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer.experts.gate_up_proj.shape == (4, 24, 8)
    default = mk.MoE(8, 12, 4)
    assert default.experts.up_proj.shape == (4, 12, 8)
    assert default.experts.up_proj_bias is None
    assert default.shared_expert is None


def test_experts_start_like_independent_linear_layers():
    experts = mk.GroupedExperts(64, 256, 4)
    bound = (6 / (64 + 256)) ** 0.5
    for expert in range(4):
        largest = float(experts.up_proj[expert].detach().abs().max())
        assert 0.97 * bound < largest <= bound
    assert not torch.equal(experts.up_proj[0], experts.up_proj[1])


def test_routing_is_in_fp32_under_autocast():
    layer = make_layer("expert")
    x = torch.randn(2, 16, 8)
    _, plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, plan = layer(x)
    assert plan.router_logits.dtype == torch.float32
    assert torch.equal(plan.router_logits, plain.router_logits)
    assert out.dtype == torch.float32


def test_bf16_module_trains():
    layer = make_layer("token", "swiglu").to(torch.bfloat16)
    x = torch.randn(2, 16, 8, dtype=torch.bfloat16, requires_grad=True)
    out, grads = gradients(layer, layer, x, torch.randn(2, 16, 8, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert all(bool(torch.isfinite(g).all()) and bool((g != 0).any()) for g in grads)


@pytest.mark.parametrize("kind", ["expert", "token"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_equals_eager(kind, backend):
    layer = make_layer(kind, "swiglu")
    x = torch.randn(2, 16, 8, requires_grad=True)
    upstream = torch.randn(2, 16, 8)
    expected, expected_grads = gradients(layer, layer, x, upstream)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    out, grads = gradients(layer, compiled, x, upstream)
    assert relative_error(out, expected) < 2e-6
    for a, b in zip(grads, expected_grads, strict=True):
        assert relative_error(a, b) < 5e-6


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["expert", "token"])
def test_checkpointing_saves_the_routing_and_keeps_the_gradients(kind):
    layer = make_layer(kind)
    x = torch.randn(2, 16, 8, requires_grad=True)
    upstream = torch.randn(2, 16, 8)
    _, expected = gradients(layer, layer, x, upstream)

    def saved(x):
        return checkpoint(layer, x, use_reentrant=False, context_fn=mk.save_routing_context_fn)

    out, plan = saved(x)
    loss = (out * upstream).sum() + mk.load_balance_loss(plan) + 0.1 * mk.router_z_loss(plan)
    with CountOps() as ops:
        grads = torch.autograd.grad(loss, [x, *layer.parameters()])
    selections = ("sort", "expert_choice", "token_choice")
    assert not any(ops.calls.get(name) for name in selections), "the selection was recomputed"
    assert ops.calls.get("gelu") or ops.calls.get("expert_mlp"), "nothing was recomputed"
    for a, b in zip(grads, expected, strict=True):
        assert torch.equal(a, b)


def test_selection_bias_buffer_is_saved_and_used():
    router = mk.TokenChoiceRouter(8, 4, 1, selection_bias=True)
    assert "selection_bias" in router.state_dict()
    router.selection_bias[2] = 100.0
    assert router(torch.randn(1, 16, 8)).expert_indices.unique().tolist() == [2]
