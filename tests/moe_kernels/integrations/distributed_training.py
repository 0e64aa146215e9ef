"""What processes get who train a model together, against what one gets from all their inputs."""

import copy
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .blocks import Results, assert_parity
from .families import HIDREAM, NUCLEUS
from .parity import Family, Inputs, cast, exact_copy, first_tensor, random_like, swapped_blocks
from .whole_models import LANGUAGE_MODELS

RANKS, STEPS = 2, 2
MIXTRAL = LANGUAGE_MODELS["Mixtral"][torch.bfloat16]  # of one layer
ALL = {family.name: family for family in (HIDREAM, NUCLEUS, MIXTRAL)}


class Net(nn.Module):
    """A block and something around it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(16, 16)
        self.block = block
        torch.nn.init.eye_(self.before.weight)
        torch.nn.init.zeros_(self.before.bias)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return first_tensor(self.block(self.before(x), *others))


def make_net(family: Family) -> Net:
    net = Net(family.make())
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("embed_tokens" not in name)  # the inputs are embeddings
    return net


def inputs_of(family: Family, rank: int) -> Inputs:
    return family.inputs(torch.float32, 2, 6, rank)


def train(net: nn.Module, inputs: dict[int, Inputs], share: int) -> dict[int, Results]:
    """A few steps on the mean loss of ``share`` processes.

    Args:
        net: that is trained.
        inputs: by the rank whose they are.
        share: 1 where gradients are averaged over processes, else their number.

    Returns:
        By rank, the losses of that rank as ``"out"`` and the gradients of each step.
    """
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-3)
    gradients: Results = {}
    losses: dict[int, list[Tensor]] = {rank: [] for rank in inputs}
    for step in range(STEPS):
        optimiser.zero_grad()
        for rank, given in inputs.items():
            out = net(*given)
            loss = (out * random_like(out, 10 * step + rank).to(out.dtype)).sum()
            losses[rank].append(loss.detach())
            (loss / share).backward()
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                gradients[f"{name.removeprefix('module.')} in step {step}"] = whole(parameter.grad)
        optimiser.step()
    return {rank: {"out": torch.stack(told), **gradients} for rank, told in losses.items()}


def whole(tensor: Any) -> Tensor:
    """A copy, put together where it is in shards."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


@cache
def trained_by_one(name: str) -> tuple[dict[int, Results], dict[int, Results]]:
    """By rank, what the original gets in one process from the inputs of all; and in fp64."""
    family = ALL[name]
    plain = make_net(family)
    inputs = {rank: inputs_of(family, rank) for rank in range(RANKS)}
    wide = {rank: cast(given, torch.float64) for rank, given in inputs.items()}
    return train(copy.deepcopy(plain), inputs, RANKS), train(exact_copy(plain), wide, RANKS)


def check_training(net: nn.Module, family: Family, swapped: int = 1) -> None:
    """Every process gets what the original gets in one process."""
    assert len(swapped_blocks(net)) == swapped
    rank = dist.get_rank()
    plain, exact = (found[rank] for found in trained_by_one(family.name))
    actual = train(net, {rank: inputs_of(family, rank)}, 1)[rank]
    assert_parity(actual, plain, exact)
    assert all(gradient.any() for gradient in actual.values())
