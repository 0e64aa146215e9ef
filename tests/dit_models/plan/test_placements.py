"""The planned parts of a rank against real placements on 64 ranks, which one process acts."""

from dataclasses import replace

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dit_models.conditioned import ConditionedModel
from dit_models.models import build_model, get_config
from dit_models.parallel.gradients import local
from dit_models.parallel.world import World
from dit_models.plan import Mesh
from dit_models.plan.units import FP32, model_units
from tests.ranks import run_ranks

RANKS = 64
# Neither 16 experts nor 24 channels divide evenly among 64 ranks; of the experts' matrices some are
# divided by experts, some by rows, some by columns, and with 64 shards one by no dimension evenly.
MODEL = replace(get_config("DiT-MoE-tiny"), depth=2, hidden_size=24, num_heads=2, num_experts=16)
MESHES = [
    Mesh(RANKS),
    Mesh(RANKS, 4),
    Mesh(RANKS, 8),  # 2 experts on 8 shards
    Mesh(RANKS, 16),
    Mesh(RANKS, 4, 8),
    Mesh(RANKS, 8, 2),
]


def parts_of_rank_0(meshes: list[Mesh]) -> list[tuple[int, int]]:
    """Bytes of its parameters, and values of those not divided by their first dimension."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from dit_models.parallel.shard import Sharding

    distributed.destroy_process_group()
    distributed.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    parts = []
    for mesh in meshes:
        dense = init_device_mesh(
            "cpu", (mesh.replicate, mesh.dense_shards), mesh_dim_names=("replicate", "shard")
        )
        experts = init_device_mesh(
            "cpu",
            (mesh.replicate, mesh.expert_shards, mesh.expert),
            mesh_dim_names=("replicate", "shard", "expert"),
        )
        world = World(torch.device("cpu"), 0, RANKS, dense, experts)
        sharding = Sharding(world)
        backbone = build_model(MODEL, on_block=sharding.shard_block)
        sharding.shard_rest(ConditionedModel(backbone))
        held = sum(p.numel() for p in map(local, backbone.parameters()))
        inner = sum(local(p).numel() for p in backbone.parameters() if _cut_dimension(p) != 0)
        parts.append((held * FP32, inner))
    return parts


def _cut_dimension(parameter: nn.Parameter) -> int:
    assert isinstance(parameter, DTensor)
    names = parameter.device_mesh.mesh_dim_names
    assert names is not None
    placement = parameter.placements[names.index("shard")]
    assert isinstance(placement, Shard | _StridedShard)
    return placement.dim


def test_rank_0_holds_what_was_planned() -> None:
    (parts,) = run_ranks(parts_of_rank_0, 1, MESHES)
    for mesh, (held, inner) in zip(MESHES, parts, strict=True):
        units = model_units(MODEL, mesh).all
        assert sum(unit.shard_numel for unit in units) * FP32 == held, str(mesh)
        assert sum(sum(unit.rearranged) // unit.shards for unit in units) == inner, str(mesh)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_all_parts_together_are_the_model(mesh: Mesh) -> None:
    parameters = sum(p.numel() for p in build_model(MODEL, device="meta").parameters())
    units = model_units(MODEL, mesh)
    experts = [block.experts for block in units.blocks if block.experts is not None]
    of_all_owners = (mesh.expert - 1) * sum(unit.numel for unit in experts)
    assert sum(unit.numel for unit in units.all) + of_all_owners == parameters
