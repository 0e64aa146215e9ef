"""What becomes of a model's experts: names, shapes, copies, checkpoints, errors."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import moe_kernels as mk
from moe_kernels.distributed import shard_experts
from tests.ranks import run_ranks

from .parallel_layers import EXPERTS, HIDDEN, SEQ, expert_mesh, make_layer, numbers


def sharded_parts(device: str) -> int:
    model = nn.ModuleList(
        [make_layer("expert_choice"), nn.Linear(3, 3), make_layer("token_choice")]
    )
    model.to(device)
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    count = shard_experts(model, expert_mesh())
    rank = torch.distributed.get_rank()
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == names
    for name, parameter in model.named_parameters():
        assert parameter.device.type == device
        if ".experts." not in name:
            assert not isinstance(parameter, DTensor)
            continue
        assert isinstance(parameter, DTensor)
        assert parameter.placements == (Shard(0),)
        local = parameter.to_local()
        assert local.shape[0] == EXPERTS // 4
        # The memory of the others is free.
        assert local.untyped_storage().nbytes() == local.nbytes
        if device == "cpu":
            assert torch.equal(local, before[name].chunk(4)[rank])
    return count


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_each_rank_keeps_its_experts(device: str) -> None:
    assert run_ranks(sharded_parts, 4, device) == [2, 2, 2, 2]


def copied(folder: str) -> None:
    mk.use_backend("cpu,reference")
    layer, single = make_layer("expert_choice"), make_layer("expert_choice")
    shard_experts(layer, expert_mesh())
    x = numbers(2, SEQ, HIDDEN, seed=1)
    expected = layer(x)[0]
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(twin(x)[0], expected)
    layer.load_state_dict(twin.state_dict())
    assert torch.equal(layer(x)[0], expected)
    # The weights of one process, and back to it.
    dcp.save(layer.state_dict(), checkpoint_id=folder)
    with torch.no_grad():
        for parameter in single.parameters():
            parameter.zero_()
    state = single.state_dict()
    dcp.load(state, checkpoint_id=folder)
    single.load_state_dict(state)
    torch.testing.assert_close(single(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_copies_and_checkpoints(tmp_path: Path) -> None:
    run_ranks(copied, 2, str(tmp_path / "state"))


def drawn_again(activation: str) -> None:
    torch.manual_seed(5)
    single = mk.MoE(HIDDEN, 8, EXPERTS, activation=activation, bias=True)
    layer = mk.MoE(HIDDEN, 8, EXPERTS, activation=activation, bias=True, device="meta")
    shard_experts(layer, expert_mesh())
    layer.to_empty(device="cpu")
    for each in (single, layer):
        torch.manual_seed(6)
        each.reset_parameters()
    for (name, ours), (_, theirs) in zip(
        layer.named_parameters(), single.named_parameters(), strict=True
    ):
        whole = ours.full_tensor() if isinstance(ours, DTensor) else ours
        assert torch.equal(whole, theirs), name


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_seed_gives_the_weights_of_one_process(activation: str) -> None:
    run_ranks(drawn_again, 2, activation)


class Own(mk.GroupedExperts):
    """Experts that run otherwise than ``moe_kernels`` does."""

    def forward(self, *args: object) -> None:  # type: ignore[override]
        raise NotImplementedError


def refused() -> dict[str, str]:
    """What is said of layers and meshes that cannot be; nothing may have changed then."""
    mesh = expert_mesh()
    layer, six, own = (
        nn.Sequential(make_layer("token_choice")),
        mk.GroupedExperts(8, 8, 6),
        Own(8, 8, 3),
    )
    both = nn.Sequential(six, layer)
    done = mk.GroupedExperts(8, 8, 3)
    shard_experts(done, mesh)
    wide = init_device_mesh("cpu", (1, 3), mesh_dim_names=("shard", "expert"))
    calls = {
        "uneven": lambda: shard_experts(both, mesh),
        "twice": lambda: shard_experts(done, mesh),
        "mesh": lambda: shard_experts(six, wide),
        "forward": lambda: shard_experts(own, mesh),
        "transport": lambda: shard_experts(six, mesh, transport="fast"),
    }
    said = {}
    for case, call in calls.items():
        with pytest.raises(ValueError) as error:  # noqa: PT011
            call()
        said[case] = str(error.value)
    assert not any(isinstance(p, DTensor) for p in both.parameters())
    assert six.parallel is None
    return said


def test_refusals() -> None:
    expected = {
        "uneven": "1.0.experts has 8 experts, which 3 ranks cannot share equally",
        "mesh": "mesh has 2 dimensions ('shard', 'expert')",
        "transport": "transport is 'fast'",
        "forward": "Own has a forward of its own",
        "twice": "GroupedExperts: its experts are parallel already",
    }
    for said in run_ranks(refused, 3):
        for case, words in expected.items():
            assert words in said[case]
