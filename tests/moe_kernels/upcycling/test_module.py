"""``UpcycledMLP`` in use: shapes, plans, compile, checkpoints, copies, precision."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_kernels as mk
from moe_kernels.testing import assert_as_accurate, relative_error
from moe_kernels.upcycling import collect_plans, upcycle
from tests.moe_kernels.upcycling.models import Blocks, Mlp, real_model

ROUTINGS = ("expert_choice", "token_choice")


def upcycled(routing: str = "expert_choice", *mlps: nn.Module, **options) -> Blocks:
    model = Blocks(*(mlps or (Mlp(), Mlp(act=nn.SiLU()))))
    upcycle(model, 4, routing, **options)
    return model


def learned(model: Blocks) -> Blocks:
    """Away from step 0, where the routed experts of expert choice are still zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 12, 16), 2), ((24, 16), 1), ((2, 3, 4, 16), 2), ((16,), 1), ((0, 12, 16), 1)],
)
def test_shapes_and_pools(routing, shape, groups):
    block = learned(upcycled(routing)).mlps[0]
    x = torch.randn(shape)
    out, plan = block.forward_with_plan(x)
    assert out.shape == x.shape
    assert plan.num_groups == groups
    assert plan.num_tokens == x.numel() // 16
    assert torch.equal(block(x), out)
    flat = x.reshape(groups, -1, 16)
    assert torch.equal(block(flat).view(shape), out)


def test_non_contiguous_input_and_further_arguments():
    block = learned(upcycled()).mlps[0]
    x = torch.randn(2, 16, 12).transpose(1, 2)
    assert torch.equal(block(x, 1.0, scale=2.0), block(x.contiguous()))


def test_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3, 8\); expected 16 features"):
        upcycled().mlps[0](torch.randn(2, 3, 8))


def test_the_sum_is_experts_plus_shared_expert():
    block = learned(upcycled()).mlps[0]
    x = torch.randn(2, 12, 16)
    plan = block.router(x)
    routed = block.experts(x.flatten(0, 1), plan).view_as(x)
    torch.testing.assert_close(block(x), routed + block.shared_expert(x))
    assert routed.abs().amax() > 0.01


@pytest.mark.parametrize("gated", [False, True])
def test_unfused_experts_are_their_mlps(gated):
    """Against a loop over the experts, with weights that differ."""
    from diffusers.models.attention import FeedForward

    mlp = FeedForward(16, inner_dim=24, activation_fn="geglu") if gated else Mlp(act=nn.SiLU())
    experts = learned(upcycled("token_choice", mlp)).mlps[0].experts
    x = torch.randn(20, 16)
    plan = mk.token_choice(torch.randn(20, 4), 2)
    upstream = torch.randn(20, 16)

    def loop(experts, x, weights):
        w_in = experts.gate_up_proj if gated else experts.up_proj
        bias_in = experts.gate_up_proj_bias if gated else experts.up_proj_bias
        out = torch.zeros_like(x)
        for row in range(40):
            e, t = int(plan.expert_of_row[row]), int(plan.token_indices[row])
            h = w_in[e] @ x[t] + bias_in[e]
            a = nn.functional.gelu(h[:24]) * h[24:] if gated else nn.functional.silu(h)
            y = experts.down_proj[e] @ a + experts.down_proj_bias[e]
            out = out.index_add(0, torch.tensor([t]), (weights[row] * y).unsqueeze(0))
        return out

    def run(compute, experts, dtype):
        tokens = x.to(dtype).requires_grad_()
        out = compute(experts, tokens)
        inputs = [tokens, *experts.parameters()]
        return [out, *torch.autograd.grad((out * upstream.to(dtype)).sum(), inputs)]

    plain = run(lambda e, t: loop(e, t, plan.routing_weights), experts, torch.float32)
    wide = copy.deepcopy(experts).double()
    exact = run(lambda e, t: loop(e, t, plan.routing_weights.double()), wide, torch.float64)
    actual = run(lambda e, t: e(t, plan), experts, torch.float32)
    for mine, theirs, truth in zip(actual, plain, exact, strict=True):
        assert_as_accurate(mine, theirs, truth)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_plans_are_collected_and_not_kept(routing):
    model = upcycled(routing)
    x = torch.randn(2, 12, 16)
    with collect_plans(model) as plans:
        model(x)
        assert [len(found) for found in plans.values()] == [1, 1]
        with collect_plans(model) as inner:
            model(x)
        model(x)
    model(x)
    assert list(plans) == ["mlps.0", "mlps.1"]
    assert [len(found) for found in plans.values()] == [2, 2]
    assert [len(found) for found in inner.values()] == [1, 1]
    for (plan, _), block in zip(plans.values(), model.mlps, strict=True):
        plan.validate()
        assert plan.router == routing
        assert block._collected is None
    loss = sum(mk.load_balance_loss(plan) for found in plans.values() for plan in found)
    loss.backward()
    assert all(block.router.weight.grad.abs().amax() > 0 for block in model.mlps)


def test_collecting_ends_when_the_body_raises():
    model = upcycled()
    with pytest.raises(RuntimeError, match="stop"), collect_plans(model):
        raise RuntimeError("stop")
    assert all(block._collected is None for block in model.mlps)


def test_nothing_to_collect_is_an_error():
    with pytest.raises(ValueError, match=r"Blocks holds no UpcycledMLP; run upcycle\(model\)"):
        collect_plans(Blocks(Mlp())).__enter__()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_compile_fullgraph_with_and_without_plans(routing):
    model = learned(upcycled(routing))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, upstream = torch.randn(2, 2, 12, 16)
    with collect_plans(model) as expected_plans:
        expected = model(x)
    wanted = torch.autograd.grad((expected * upstream).sum(), list(model.parameters()))
    torch.testing.assert_close(compiled(x), expected)
    with collect_plans(model) as plans:
        out = compiled(x)
    torch.testing.assert_close(out, expected)
    for path, (plan,) in plans.items():
        assert torch.equal(plan.token_indices, expected_plans[path][0].token_indices)
    found = torch.autograd.grad((out * upstream).sum(), list(model.parameters()))
    for mine, theirs in zip(found, wanted, strict=True):
        assert relative_error(mine, theirs) < 1e-5
    # Both graphs are there now.
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x)
        with collect_plans(model) as plans:
            compiled(x)
    assert [len(found) for found in plans.values()] == [1, 1]


def test_a_compiled_model_notices_that_it_is_upcycled():
    model = Blocks(Mlp())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 12, 16)
    compiled(x)
    report = upcycle(compiled, 4, "token_choice")
    assert [entry.path for entry in report.upcycled] == ["mlps.0"]
    learned(model)
    with collect_plans(compiled) as plans:
        out = compiled(x)
    assert len(plans["mlps.0"]) == 1
    torch.testing.assert_close(out, model(x))


def test_a_block_compiled_by_itself_is_left_alone():
    model = Blocks(torch.compile(Mlp(), backend="eager"), Mlp())
    report = upcycle(model, 4)
    assert [entry.path for entry in report.upcycled] == ["mlps.1"]
    assert report.skipped[0].path == "mlps.0"
    assert "compile it after upcycling" in report.skipped[0].skipped


@pytest.mark.parametrize("routing", ROUTINGS)
def test_state_dict_goes_into_another_upcycled_model(routing):
    model = learned(upcycled(routing))
    x = torch.randn(2, 12, 16)
    other = upcycled(routing, seed=5)
    assert relative_error(other(x), model(x)) > 1e-3
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert torch.equal(other(x), model(x))
    empty = Blocks(Mlp(), Mlp(act=nn.SiLU())).to("meta")
    report = upcycle(empty, 4, routing)
    assert report.max_difference is None
    assert "not measured" in str(report)
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(x), model(x))


@pytest.mark.parametrize("mode", ["split", "drop"])
def test_meta_in_every_mode(mode):
    model = Blocks(Mlp(act=nn.SiLU())).to("meta")
    upcycle(model, 4, "token_choice", mode, keep_function=False)
    other = Blocks(Mlp(act=nn.SiLU()))
    upcycle(other, 4, "token_choice", mode, keep_function=False)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in other.state_dict().items()}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_with_their_own_weights(copied):
    model = learned(upcycled())
    x = torch.randn(2, 12, 16)
    before = model(x)
    twin = copied(model)
    learned(model)
    assert torch.equal(twin(x), before)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_autocast_and_bf16_training(routing):
    model = learned(upcycled(routing))
    x, upstream = torch.randn(2, 2, 12, 16)
    exact = copy.deepcopy(model).double()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert relative_error(out, exact(x.double())) < 0.03
    (out * upstream).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    half = copy.deepcopy(model).bfloat16()
    half.zero_grad()
    out = half(x.bfloat16())
    assert out.dtype == torch.bfloat16
    (out * upstream.bfloat16()).sum().backward()
    assert half.mlps[0].router.weight.grad.dtype == torch.bfloat16
    assert half.mlps[1].experts.up_proj.grad.abs().amax() > 0


def test_activation_checkpointing_gives_the_same_gradients():
    model = learned(upcycled())
    x, upstream = torch.randn(2, 2, 12, 16)
    wanted = torch.autograd.grad((model(x) * upstream).sum(), list(model.parameters()))
    options = {"use_reentrant": False, "context_fn": mk.save_routing_context_fn}
    with collect_plans(model) as plans:
        out = checkpoint(model, x, **options)
    found = torch.autograd.grad((out * upstream).sum(), list(model.parameters()))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
    assert [len(found) for found in plans.values()] == [1, 1]


def test_two_runs_give_equal_bits():
    model = learned(upcycled("token_choice"))
    x, upstream = torch.randn(2, 2, 40, 16)

    def run():
        out = model(x)
        return [out, *torch.autograd.grad((out * upstream).sum(), list(model.parameters()))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_real_model_trains_with_checkpointing():
    model, run, _ = real_model("dit")
    upcycle(model, 4)
    model.train()
    model.enable_gradient_checkpointing()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with collect_plans(model) as plans:
        out = run(model)
    balance = sum(mk.load_balance_loss(plan) for found in plans.values() for plan in found)
    ((out * torch.randn_like(out)).sum() + 0.01 * balance).backward()
    optimiser.step()
    for name in ("experts.down_proj", "router.weight", "shared_expert.net.2.weight"):
        path = f"transformer_blocks.0.ff.{name}"
        assert not torch.equal(model.get_parameter(path), before[path])
