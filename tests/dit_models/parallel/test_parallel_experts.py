"""Whole models with parallel experts against one process, for every routing."""

from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import moe_kernels as mk
from moe_kernels.distributed import shard_experts
from tests.dit_models.routing.models import inputs_for, moved, tiny
from tests.ranks import run_ranks

IMAGES, RANKS = 2, 2
ROUTINGS = {
    "expert_choice": ("EC-DiT-tiny", {}),
    "token_choice": ("DiT-MoE-tiny", {}),
    "decoupled": ("decoupled", {"group": "batch"}),
    "diffmoe": ("diffmoe", {}),
    "expert_race": ("expert_race", {}),
    "loss_free": ("loss_free", {}),
}


def step(model: Any, inputs: dict[str, Tensor], upstream: Tensor) -> Tensor:
    """Forward and backward of one rank's images."""
    output: Tensor = model(**inputs).sample
    output.backward(upstream)
    return output.detach()


def compare(routing: str, recompute: bool) -> float:
    """Largest relative error of the output and of any gradient."""
    mk.use_backend("cpu,reference")
    rank = distributed.get_rank()
    name, changes = ROUTINGS[routing]
    config = tiny(name, **changes)
    inputs = {
        name: (value.double() if value.is_floating_point() else value).split(IMAGES)
        for name, value in inputs_for(config, IMAGES * RANKS).items()
    }
    single, model = (moved(config).double().train() for _ in range(2))
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("expert",))
    assert shard_experts(model, mesh) == len(config.moe_blocks)
    model.gradient_checkpointing = recompute
    errors = []

    def compare_tensors(found: Tensor, expected: Tensor) -> None:
        # Softmax takes no notice of the keys' bias: its gradient is 0 but for rounding.
        scale = expected.abs().max().clamp_min(1e-2)
        errors.append(float((found - expected).abs().max() / scale))

    for owner in range(RANKS):
        own = {name: parts[owner] for name, parts in inputs.items()}
        generator = torch.Generator().manual_seed(owner)
        upstream = torch.randn(own["latents"].shape, generator=generator).double()
        expected = step(single, own, upstream)
        if owner == rank:
            compare_tensors(step(model, own, upstream), expected)
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), single.named_parameters(), strict=True
    ):
        if theirs.grad is None:
            assert ours.grad is None, name
            continue
        assert ours.grad is not None, name
        if isinstance(ours.grad, DTensor):
            found = ours.grad.full_tensor()
        else:
            found = ours.grad
            distributed.all_reduce(found)
        compare_tensors(found, theirs.grad)
    return max(errors)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_as_one_process(routing: str) -> None:
    recompute = routing in ("expert_choice", "expert_race")
    assert max(run_ranks(compare, RANKS, routing, recompute)) < 1e-12
