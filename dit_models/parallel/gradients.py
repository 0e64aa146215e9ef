"""The norm of a gradient that is divided among processes, and clipping by it."""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from dit_models.parallel.world import World


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[nn.Parameter], limit: float, world: World) -> Tensor:
    """Scale a divided gradient so that its norm over all parameters is at most ``limit``.

    The processes that share one copy of the model hold each value of the gradient exactly once,
    whatever mesh a parameter is on: the squares of what they hold add up to the square of the norm.

    Args:
        parameters: all parameters of the model, as ``Sharding`` left them.
        limit: largest norm; infinity only measures.
        world: the processes.

    Returns:
        The norm before clipping, the same in every process.
    """
    assert world.dense is not None
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    square = torch.nn.utils.get_total_norm(gradients).square().to(world.device)
    distributed.all_reduce(square, group=world.dense["shard"].get_group())
    norm = square.sqrt()
    if limit < float("inf"):
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
