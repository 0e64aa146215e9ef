"""Options, recipes, randomness, reports and errors of ``upcycle``."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import moe_kernels as mk
from moe_kernels.testing import relative_error
from moe_kernels.upcycling import UpcycledMLP, convert, measure_importance, upcycle
from moe_kernels.upcycling.blocks import read_dense
from moe_kernels.upcycling.build import deal_channels, weight_importance
from tests.moe_kernels.upcycling.models import Blocks, Mlp


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_seed_decides_everything_and_nothing_else_does():
    dense = Blocks(Mlp(), Mlp())

    def make(**options) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(dense)
        upcycle(model, 4, "token_choice", "drop", False, **options)
        return state(model)

    before = torch.random.get_rng_state()
    first = make()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(77)
    assert same(first, make())
    assert same(first, make(verify=False))
    assert not same(first, make(seed=1))
    alone = make(include="mlps.1")
    for name in ("router.weight", "experts.up_proj", "experts.down_proj"):
        assert torch.equal(alone[f"mlps.1.{name}"], first[f"mlps.1.{name}"])
        assert not torch.equal(first[f"mlps.0.{name}"], first[f"mlps.1.{name}"])


def test_router_starts_normal():
    model = Blocks(Mlp(512, 8), hidden_size=512)
    upcycle(model, 16, "token_choice", router_std=0.05)
    weight = model.mlps[0].router.weight
    assert float(weight.detach().std()) == pytest.approx(0.05, rel=0.05)
    assert abs(float(weight.detach().mean())) < 0.005


def test_copies_are_copies():
    dense = Mlp()
    model = Blocks(copy.deepcopy(dense))
    upcycle(model, 3, "token_choice", keep_function=False)
    experts = model.mlps[0].experts
    for expert in range(3):
        assert torch.equal(experts.up_proj[expert], dense.fc1.weight)
        assert torch.equal(experts.down_proj[expert], dense.fc2.weight)
        assert torch.equal(experts.up_proj_bias[expert], dense.fc1.bias)
        assert torch.equal(experts.down_proj_bias[expert], dense.fc2.bias)
    assert experts.up_proj.data_ptr() != dense.fc1.weight.data_ptr()


@pytest.mark.parametrize("drop_ratio", [0.0, 0.25, 1.0])
def test_dropped_channels_are_drawn_from_the_statistics_of_the_dense_ones(drop_ratio):
    dense = Mlp(64, 400)
    with torch.no_grad():  # means and deviations that differ between the tensors
        dense.fc1.weight.mul_(3).add_(0.7)
        dense.fc2.weight.mul_(0.2).add_(-1.3)
        dense.fc1.bias.add_(5)
    model = Blocks(copy.deepcopy(dense), hidden_size=64)
    upcycle(model, 3, "token_choice", "drop", False, drop_ratio=drop_ratio)
    experts = model.mlps[0].experts
    chosen = set()
    for expert in range(3):
        drawn = (experts.up_proj[expert] != dense.fc1.weight).any(dim=1)
        assert int(drawn.sum()) == round(400 * drop_ratio)
        assert torch.equal((experts.down_proj[expert] != dense.fc2.weight).any(dim=0), drawn)
        assert torch.equal(experts.up_proj_bias[expert] != dense.fc1.bias, drawn)
        assert torch.equal(experts.down_proj_bias[expert], dense.fc2.bias)
        chosen.add(tuple(drawn.tolist()))
        if drop_ratio:
            for mine, theirs in (
                (experts.up_proj[expert, drawn], dense.fc1.weight[drawn]),
                (experts.down_proj[expert][:, drawn], dense.fc2.weight[:, drawn]),
            ):
                assert mine.mean().item() == pytest.approx(theirs.mean().item(), rel=0.05)
                assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
    assert len(chosen) == (3 if drop_ratio == 0.25 else 1)


def test_one_dropped_channel_has_a_deviation():
    model = Blocks(Mlp())
    bias = model.mlps[0].fc1.bias.detach().clone()
    upcycle(model, 3, "token_choice", "drop", False, drop_ratio=1 / 24)
    experts = model.mlps[0].experts
    assert all(torch.isfinite(parameter).all() for parameter in experts.parameters())
    # A single number has no deviation: it is drawn as itself.
    torch.testing.assert_close(experts.up_proj_bias, bias.expand(3, -1))


def test_dropped_channels_of_a_gated_mlp_are_the_same_in_both_halves():
    from diffusers.models.attention import FeedForward

    block = FeedForward(16, inner_dim=24, activation_fn="swiglu", bias=False)
    dense = read_dense(block)
    model = Blocks(block)
    upcycle(model, 2, "token_choice", "drop", False)
    drawn = (model.mlps[0].experts.gate_up_proj[0] != dense.w_in).any(dim=1)
    assert torch.equal(drawn[:24], drawn[24:])
    assert int(drawn.sum()) == 24


def test_channels_are_dealt_out_there_and_back():
    importance = torch.tensor([5.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0])
    # By importance: channels 2 4 | 6 0 | 7 5 | 3 1, every other pair turned.
    assert deal_channels(importance, 2).tolist() == [[0, 1, 2, 7], [3, 4, 5, 6]]
    shares = importance[deal_channels(importance, 2)].sum(dim=1)
    assert shares.tolist() == [18, 18]
    assert deal_channels(importance, 1).tolist() == [list(range(8))]
    assert deal_channels(torch.zeros(6), 3).tolist() == [[0, 5], [1, 4], [2, 3]]


def test_importance_is_of_the_weights_by_default_or_yours():
    dense = Mlp()
    norms = dense.fc1.weight.norm(dim=1) * dense.fc2.weight.norm(dim=0)
    torch.testing.assert_close(weight_importance(read_dense(dense)), norms.detach())
    mine = torch.randn(24)

    def first_shard(importance) -> torch.Tensor:
        model = Blocks(copy.deepcopy(dense))
        upcycle(model, 4, "token_choice", "split", importance=importance)
        return model.mlps[0].experts.up_proj[0]

    assert torch.equal(first_shard(None), dense.fc1.weight[deal_channels(norms, 2)[0]])
    expected = dense.fc1.weight[deal_channels(mine, 2)[0]]
    assert torch.equal(first_shard({"mlps.0": mine}), expected)
    seen = []

    def by_path(path, module):
        seen.append((path, type(module)))
        return mine

    assert torch.equal(first_shard(by_path), expected)
    assert seen == [("mlps.0", Mlp)]
    with pytest.raises(ValueError, match=r"importance has no entry for mlps.0; it has mlps.3"):
        first_shard({"mlps.3": mine})
    with pytest.raises(ValueError, match=r"has shape \(23,\); expected \(24,\)"):
        first_shard({"mlps.0": mine[1:]})
    with pytest.raises(ValueError, match="mode 'copy'; only \"split\" orders channels"):
        upcycle(Blocks(Mlp()), 4, importance={"mlps.0": mine})


def test_measured_importance():
    model = Blocks(Mlp(), Mlp(act=nn.SiLU()))
    batches = torch.randn(3, 2, 10, 16)
    inputs = {name: [] for name in ("mlps.0", "mlps.1")}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(args[0])
        )
        for name in inputs
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    measured = measure_importance(model, lambda: [model(batch) for batch in batches])
    for name, tokens in inputs.items():
        mlp = model.get_submodule(name)
        h = mlp.act(mlp.fc1(torch.cat(tokens).flatten(0, 1)))
        expected = h.abs().mean(dim=0) * mlp.fc2.weight.norm(dim=0)
        torch.testing.assert_close(measured[name], expected.detach())
    assert not any(module._forward_pre_hooks for module in model.modules())
    upcycle(model, 4, "token_choice", "split", importance=measured)
    with pytest.raises(ValueError, match="sent nothing through the 0 dense MLPs of Blocks"):
        measure_importance(model, lambda: model(batches[0]))


def test_include_and_exclude():
    def upcycled_paths(**options) -> list[str]:
        report = upcycle(Blocks(Mlp(), Mlp(), Mlp()), 4, **options)
        assert len(report.blocks) == 3
        return [entry.path for entry in report.upcycled]

    assert upcycled_paths() == ["mlps.0", "mlps.1", "mlps.2"]
    assert upcycled_paths(include="mlps.[02]") == ["mlps.0", "mlps.2"]
    assert upcycled_paths(include=["mlps.0", "mlps.1"], exclude="*.0") == ["mlps.1"]
    with pytest.raises(
        ValueError, match=r"include pattern 'blocks.\*' fits no dense MLP; .*mlps.0"
    ):
        upcycled_paths(include="blocks.*")
    with pytest.raises(ValueError, match="exclude pattern 'mlp' fits no dense MLP"):
        upcycled_paths(exclude="mlp")
    with pytest.raises(mk.NothingMatched, match=r"mlps.2 \(Mlp\): excluded"):
        upcycled_paths(exclude="*")


def test_a_block_in_two_places_is_replaced_in_both():
    shared = Mlp()
    model = Blocks(shared, shared)
    x = torch.randn(2, 12, 16)
    expected = model(x)
    report = upcycle(model, 4, "token_choice")
    assert model.mlps[0] is model.mlps[1]
    assert isinstance(model.mlps[0], UpcycledMLP)
    assert report.skipped[0].skipped == "the same module as mlps.0"
    assert relative_error(model(x), expected) < 2e-6


def test_the_block_itself_cannot_be_given():
    with pytest.raises(ValueError, match=r"itself a dense MLP \(Mlp\).*give the module that holds"):
        upcycle(Mlp(), 4)


class DistributedDataParallel(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_wrapped_models_are_refused():
    with pytest.raises(ValueError, match=r"the model is a DistributedDataParallel.*upcycle first"):
        upcycle(DistributedDataParallel(Blocks(Mlp())), 4)


def test_nothing_is_replaced_when_a_block_fails(monkeypatch):
    model = Blocks(Mlp(), Mlp())
    before = list(model.mlps)
    build = convert.build

    def wrong(block, *args):
        made = build(block, *args)
        if block is before[1]:
            with torch.no_grad():
                made.experts.down_proj.mul_(1.001)
        return made

    monkeypatch.setattr(convert, "build", wrong)
    with pytest.raises(mk.VerificationFailed, match=r"mlps.1 with keep_function=True changes its"):
        upcycle(model, 4, "token_choice")
    assert list(model.mlps) == before
    # Without the promise the difference is only reported.
    report = upcycle(model, 4, "token_choice", keep_function=False, normalize="per_token")
    assert report.blocks[0].difference < 1e-6 < 1e-4 < report.blocks[1].difference


def test_report_counts_parameters():
    mlp = Mlp()
    size = sum(parameter.numel() for parameter in mlp.parameters())
    report = upcycle(Blocks(copy.deepcopy(mlp)), 8, "token_choice", top_k=3)
    (entry,) = report.blocks
    assert (entry.parameters_before, entry.activated_before) == (size, size)
    assert entry.parameters_after == 8 * size + 8 * 16
    assert entry.activated_after == 3 * size + 8 * 16
    report = upcycle(Blocks(copy.deepcopy(mlp)), 8, capacity_factor=1.5)
    (entry,) = report.blocks
    assert entry.parameters_after == 9 * size + 8 * 16
    assert entry.activated_after == round(2.5 * size) + 8 * 16


def test_report_reads_well():
    report = upcycle(Blocks(Mlp(1000, 4000), Mlp(1000, 100, drop=0.1), hidden_size=1000), 8)
    lines = str(report).splitlines()
    assert lines[0] == (
        "upcycled 1 of 2 dense MLPs: expert choice, capacity factor 2, 8 experts; copy; "
        "function kept by the dense MLP as shared expert"
    )
    assert lines[1].split() == (
        ["block", "class", "activation", "parameters", "activated", "difference"]
    )
    assert lines[2].split()[:3] == ["mlps.0", "Mlp", "gelu_tanh"]
    assert lines[2].endswith("8.01 M -> 72.1 M  8.01 M -> 24 M  0")
    assert lines[3].split()[:3] == ["mlps.1", "Mlp", "skipped:"]
    assert lines[4] == (
        "total: 8.01 M -> 72.1 M parameters, 8.01 M -> 24 M of them activated by a token"
    )
    split = upcycle(Blocks(Mlp()), 4, "token_choice", "split")
    assert "token choice, top 2 of 4; 2 shards of each MLP; function kept by the routing" in str(
        split
    )
    drop = upcycle(Blocks(Mlp()), 4, "token_choice", "drop", False)
    assert "50% of the channels drawn anew; plain weights" in str(drop)


@pytest.mark.parametrize("group", ["batch", 8])
def test_pools_of_expert_choice(group):
    model = Blocks(Mlp())
    upcycle(model, 4, group=group)
    _, plan = model.mlps[0].forward_with_plan(torch.randn(4, 8, 16))
    assert plan.num_groups == (1 if group == "batch" else 4)


BAD_OPTIONS = [
    ({"num_experts": 0}, "num_experts is 0; expected an integer of at least 1"),
    ({"routing": "top_k"}, "routing is 'top_k'; expected one of 'expert_choice', 'token_choice'"),
    ({"mode": "moe"}, "mode is 'moe'; expected one of 'copy', 'split', 'drop'"),
    ({"normalize": "softmax"}, "normalize is 'softmax'"),
    ({"group": "row"}, "group is 'row'"),
    ({"router_std": 0.0}, "router_std is 0.0; expected a positive number"),
    ({"mode": "drop", "drop_ratio": 1.5}, "drop_ratio is 1.5; expected 0 to 1"),
    ({"shards": 2}, "shards is 2 in mode 'copy'"),
    ({"mode": "split", "shards": 3}, "num_experts is 8; expected a multiple of shards = 3"),
    ({"top_k": 2}, "top_k is 2 with expert choice"),
    ({"capacity_factor": 9.0}, "capacity_factor is 9.0; expected more than 0 and at most"),
    ({"routing": "token_choice", "capacity_factor": 2.0}, "capacity_factor is 2.0 with token"),
    ({"routing": "token_choice", "top_k": 9}, "top_k is 9; expected at most 8 experts"),
    ({"routing": "token_choice", "group": "batch"}, "group is 'batch' with token choice"),
    ({"routing": "token_choice", "normalize": "none"}, 'normalize is "none" with keep_function'),
    (
        {"routing": "token_choice", "mode": "split", "top_k": 3},
        "top_k is 3 with keep_function=True; a token needs all 2 shards",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(options, message):
    model = Blocks(Mlp())
    before = model.mlps[0]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        upcycle(model, **{"num_experts": 8, **options})
    assert model.mlps[0] is before


def test_one_expert():
    for routing in ("expert_choice", "token_choice"):
        model = Blocks(Mlp())
        x = torch.randn(2, 12, 16)
        expected = model(x)
        upcycle(model, 1, routing)
        assert relative_error(model(x), expected) < 1e-6


def test_the_example_of_the_guide_runs_and_prints_what_it_says(capsys):
    guide = (Path(__file__).parents[3] / "docs" / "upcycling.md").read_text()
    code, printed = re.match(r".*?```python\n(.*?)```\n\n```\n(.*?)```", guide, re.S).groups()
    exec(compile(code, "docs/upcycling.md", "exec"), {})
    number = r"\d\.\de-07"  # of the weights that were drawn
    out = capsys.readouterr().out
    assert re.sub(number, "", out) == re.sub(number, "", printed)
