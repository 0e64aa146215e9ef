"""A small model on any mesh, with every kind of tensor that a checkpoint must hold."""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

PLAIN = {"config": {"seed": 3}, "step": 7, "loader": {"position": 5}, "train_seconds": 1.5,
         "wall_seconds": 2.5}  # fmt: skip


class Experts(nn.Module):
    """The weights of some experts."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, 3, 5))


class Model(nn.Module):
    """Sizes that no number of processes divides, some smaller than it, a scalar, other dtypes."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = Experts(experts)
        self.few = Experts(2)
        self.dense = nn.Linear(5, 7)
        self.narrow = nn.Linear(3, 1)
        self.coarse = nn.Parameter(torch.randn(9, 2).bfloat16())
        self.register_buffer("counts", torch.randint(0, 1 << 40, (6,)))
        self.register_buffer("scale", torch.randn(()))
        self.register_buffer("none", torch.zeros(0, 4))


@dataclass(frozen=True)
class State:
    """A model in training."""

    model: Model
    optimizer: torch.optim.Optimizer

    def tensors(self) -> dict[str, Tensor]:
        """By their names in a checkpoint."""
        named = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        named |= {f"ema.{name}": value.clone() for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                named[f"optimizer.{name}.{key}"] = value
        return named | {"rng.generator": torch.Generator().manual_seed(5).get_state()}


def trained(expert: int = 1, replicate: int = 1, experts: int = 6, seed: int = 0) -> State:
    """The state after some steps of AdamW, the same for every mesh.

    Args:
        expert: processes that share the experts; 0 without ``torch.distributed``.
        replicate: copies of everything.
        experts: six have two owners of three, which two shards divide unevenly.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    model = Model(experts)
    if expert:
        _divide(model, expert, replicate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = (parameter.detach() * 0.7).sin()
        optimizer.step()
    return State(model, optimizer)


def _divide(model: Model, expert: int, replicate: int) -> None:
    shape = (replicate, distributed.get_world_size() // replicate // expert, expert)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "expert"))
    dense = init_device_mesh(
        "cpu", (replicate, shape[1] * expert), mesh_dim_names=("replicate", "shard")
    )
    taken = ("replicate", "shard") if replicate > 1 else ("shard",)
    for layer in (model.experts, model.few):
        weight = layer.weight.data
        # Two experts of two owners leave nothing for the second shard of each.
        if expert > 1 and len(weight) % expert == 0:
            own = weight.chunk(expert)[mesh["expert"].get_local_rank()].clone()
            layer.weight = nn.Parameter(DTensor.from_local(own, mesh["expert"], [Shard(0)]))
            fully_shard(layer, mesh=mesh[taken])
    fully_shard(model, mesh=dense[taken])


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor in full, in every process."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in tensors.items()
    }


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal bit by bit, or are in one of both only."""
    return sorted(found.keys() ^ expected.keys()) + [
        name
        for name in found.keys() & expected.keys()
        if found[name].dtype != expected[name].dtype
        or found[name].shape != expected[name].shape
        or not torch.equal(found[name], expected[name])
    ]
