"""Samples of ``expert_mlp`` and its backward as samples of the ops that take lists of weights."""

from typing import Any

import torch
from torch import Tensor


def as_parts(args: tuple[Any, ...], first: int) -> tuple[Any, ...]:
    """The same call with lists of each expert's weights.

    Args:
        args: of ``expert_mlp`` or ``expert_mlp_bwd``.
        first: position of w_in; w_out and the biases follow.
    """
    halves = 2 if args[-1] == "swiglu" else 1
    lists = []
    for number, stacked in enumerate(args[first : first + 4]):
        cuts = halves if number in (0, 2) else 1
        lists.append([] if stacked is None else split(stacked, cuts))
    return (*args[:first], *lists, *args[first + 4 :])


def split(stacked: Tensor, cuts: int) -> list[Tensor]:
    """Each expert's share, cut in equal parts; adjacent in memory for every second tensor."""
    copied = stacked.detach().clone().unflatten(1, (cuts, -1)).flatten(0, 1)
    parts = list(copied.unbind(0))
    if copied.numel() % 2:
        parts = [torch.empty_like(part).copy_(part) for part in parts]
    return [part.detach().requires_grad_(stacked.requires_grad) for part in parts]
