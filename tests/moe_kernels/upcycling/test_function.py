"""What ``keep_function`` promises: outputs and gradients of the dense model, to rounding."""

import copy

import pytest
import torch
from torch import nn

from moe_kernels.testing import assert_as_accurate, relative_error
from moe_kernels.upcycling import UpcycledMLP, collect_plans, upcycle
from tests.moe_kernels.upcycling.models import REAL_MODELS, Blocks, Mlp, real_model

RECIPES = [
    ("expert_choice", "copy", {}),
    ("expert_choice", "split", {"shards": 4, "capacity_factor": 3.0}),
    ("expert_choice", "drop", {}),
    ("token_choice", "copy", {"top_k": 3}),
    ("token_choice", "split", {"shards": 4}),
    ("token_choice", "split", {"top_k": 4}),
    ("token_choice", "drop", {}),
]
IDS = [f"{routing}-{mode}-{i}" for i, (routing, mode, _) in enumerate(RECIPES)]


@pytest.mark.parametrize(("routing", "mode", "options"), RECIPES, ids=IDS)
@pytest.mark.parametrize("name", REAL_MODELS)
def test_real_models_compute_the_same_function(name, routing, mode, options):
    model, run, blocks = real_model(name)
    with torch.no_grad():
        plain = run(model)
        exact = run(copy.deepcopy(model).double())
        report = upcycle(model, 8, routing, mode, **options)
        actual = run(model)
    assert len(report.upcycled) == blocks
    assert sum(isinstance(module, UpcycledMLP) for module in model.modules()) == blocks
    assert_as_accurate(actual, plain, exact)
    if routing == "expert_choice" or mode == "drop":
        assert torch.equal(actual, plain)  # the routed experts add exact zeros
        assert report.max_difference == 0
    else:
        assert 0 < report.max_difference < 2e-6


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"], indirect=True)
@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU()], ids=["fused", "unfused"])
@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_every_backend(backend, routing, act):
    model = Blocks(Mlp(act=act))
    x = torch.randn(2, 20, 16)
    exact, plain = copy.deepcopy(model).double()(x.double()), model(x)
    report = upcycle(model, 4, routing)
    assert_as_accurate(model(x), plain, exact)
    assert report.max_difference < 2e-6


@pytest.mark.parametrize(("routing", "mode", "options"), RECIPES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, routing, mode, options):
    model = Blocks(Mlp(), Mlp(act=nn.GELU())).to(dtype)
    x = torch.randn(2, 20, 16).to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    plain = model(x)
    upcycle(model, 8, routing, mode, **options)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert_as_accurate(model(x), plain, exact)


def gradients(model, x, upstream):
    """Of the input and of every parameter."""
    x = x.clone().requires_grad_()
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad((model(x) * upstream).sum(), [x, *parameters])
    return found[0], dict(zip(names, found[1:], strict=True))


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU()], ids=["fused", "unfused"])
def test_gradients_of_copies_add_up_to_the_dense_gradients(act):
    """Identical experts with weights that sum to 1: also the derivatives are the dense model's."""
    model = Blocks(Mlp(act=act)).double()
    x, upstream = torch.randn(2, 3, 20, 16).double()
    dx, dense = gradients(model, x, upstream)
    upcycle(model, 4, "token_choice")
    moe_dx, moe = gradients(model, x, upstream)
    assert relative_error(moe_dx, dx) < 1e-12
    for moe_name, name in (
        ("experts.up_proj", "fc1.weight"),
        ("experts.up_proj_bias", "fc1.bias"),
        ("experts.down_proj", "fc2.weight"),
        ("experts.down_proj_bias", "fc2.bias"),
    ):
        total = moe[f"mlps.0.{moe_name}"].sum(dim=0)
        assert relative_error(total, dense[f"mlps.0.{name}"]) < 1e-12


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_shards_add_up_to_the_dense_gradients(gated):
    model = llama_like() if gated else Blocks(Mlp(act=nn.GELU()))
    model = model.double()
    x, upstream = torch.randn(2, 3, 20, 16).double()
    dx, dense = gradients(model, x, upstream)
    original = copy.deepcopy(model)
    upcycle(model, 6, "token_choice", "split", shards=3)
    moe_dx, moe = gradients(model, x, upstream)
    assert relative_error(moe_dx, dx) < 1e-12
    name_out = "down_proj" if gated else "fc2"
    w_out = original.get_parameter(f"mlps.0.{name_out}.weight")
    shards = model.get_parameter("mlps.0.experts.down_proj")
    channels = [channels_of(shards[e], w_out) for e in range(3)]
    assert sorted(c for shard in channels for c in shard) == list(range(24))
    for shard in range(3):
        # Experts e and e + 3 are the same shard of the two copies.
        total = moe["mlps.0.experts.down_proj"][shard::3].sum(dim=0)
        expected = dense[f"mlps.0.{name_out}.weight"][:, channels[shard]]
        assert relative_error(total, expected) < 1e-12


def channels_of(shard: torch.Tensor, w_out: torch.Tensor) -> list[int]:
    """Which columns of ``w_out`` a shard's columns are."""
    same = (shard.unsqueeze(2) == w_out.unsqueeze(1)).all(dim=0)  # (columns, F)
    assert (same.sum(dim=1) == 1).all()
    return same.long().argmax(dim=1).tolist()


def llama_like() -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    return Blocks(
        LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2))
    )


def test_a_kept_dense_mlp_has_the_dense_gradients():
    model = Blocks(Mlp())
    x, upstream = torch.randn(2, 3, 20, 16)
    dx, dense = gradients(model, x, upstream)
    fc1 = model.mlps[0].fc1.weight
    upcycle(model, 4)
    moe_dx, moe = gradients(model, x, upstream)
    assert torch.equal(moe_dx, dx)
    assert torch.equal(moe["mlps.0.shared_expert.fc1.weight"], dense["mlps.0.fc1.weight"])
    assert model.mlps[0].shared_expert.fc1.weight is fc1  # the optimiser's state stays valid


@pytest.mark.parametrize("keep_function", [True, False])
@pytest.mark.parametrize(("routing", "mode", "options"), RECIPES, ids=IDS)
def test_every_expert_with_a_token_learns(routing, mode, options, keep_function):
    model = Blocks(Mlp())
    upcycle(model, 8, routing, mode, keep_function, **options)
    experts = model.mlps[0].experts
    x = torch.randn(2, 24, 16)
    with collect_plans(model) as plans:
        out = model(x)
    (out * torch.randn_like(out)).sum().backward()
    got_tokens = plans["mlps.0"][0].tokens_per_expert > 0
    assert got_tokens.any()
    moved = experts.down_proj.grad.flatten(1).abs().amax(dim=1) > 0
    assert torch.equal(moved, got_tokens)
    before = experts.down_proj.detach().clone()
    torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0).step()
    changed = (experts.down_proj.detach() != before).flatten(1).any(dim=1)
    assert torch.equal(changed, got_tokens)
    # The second step also reaches projections in and router of experts that started at zero.
    model.zero_grad()
    out = model(x)
    (out * torch.randn_like(out)).sum().backward()
    assert experts.up_proj.grad.abs().amax() > 0
    assert model.mlps[0].router.weight.grad.abs().amax() > 0


def test_plain_recipe_loses_what_the_weights_lack():
    """Raw top-2 softmax weights of E near-equal affinities sum to about 2/E."""
    dense = Mlp(act=nn.GELU())
    x = torch.randn(4, 64, 16)
    expected = dense(x)
    differences = {}
    for num_experts in (4, 8):
        for keep_function in (True, False):
            model = Blocks(copy.deepcopy(dense))
            upcycle(model, num_experts, "token_choice", keep_function=keep_function)
            with torch.no_grad():
                out = model.mlps[0](x)
            relative = (out - expected).norm() / expected.norm()
            differences[num_experts, keep_function] = relative.item()
    assert differences[4, True] < 1e-6
    assert differences[8, True] < 1e-6
    assert differences[4, False] == pytest.approx(1 - 2 / 4, abs=0.05)
    assert differences[8, False] == pytest.approx(1 - 2 / 8, abs=0.05)


def test_plain_expert_choice_gives_nothing_to_tokens_that_nobody_takes():
    model = Blocks(Mlp(bias=(True, False)))
    upcycle(model, 8, "expert_choice", keep_function=False, capacity_factor=1.0)
    x = torch.randn(2, 64, 16)
    out, plan = model.mlps[0].forward_with_plan(x)
    nobody = (plan.experts_per_token == 0).view(2, 64)
    assert 0 < nobody.sum() < 128
    assert (out[nobody] == 0).all()
    assert (out[~nobody].abs().amax(dim=-1) > 0).all()


def test_tokens_take_whole_copies_of_the_dense_mlp():
    model = Blocks(Mlp(intermediate_size=30))
    upcycle(model, 12, "token_choice", "split", shards=3, top_k=6)
    router = model.mlps[0].router
    rows = router.weight.view(4, 3, 16)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert len(rows[:, 0].unique(dim=0)) == 4
    plan = router(torch.randn(8, 128, 16))
    copies = (plan.expert_indices // 3).sort(dim=1).values.view(-1, 2, 3)
    assert torch.equal(copies, copies[:, :, :1].expand_as(copies))
    assert (copies[:, 0, 0] < copies[:, 1, 0]).all()
