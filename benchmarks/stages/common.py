"""Random inputs that every precision routes alike, and the truth about rows of a selection."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

# Smallest relative gap between the last chosen and the first rejected affinity. fp32 routers err
# by about 1e-6 at hidden size 768, and a comparison of selections needs one right answer.
MIN_GAP = 1e-5

Made = TypeVar("Made")


def leaf(tensor: Tensor) -> Tensor:
    """A leaf that requires a gradient and shares the memory of ``tensor``."""
    return tensor.detach().requires_grad_()


def gap(affinity: Tensor, count: int) -> float:
    """Smallest relative gap at the boundary of a top-``count`` over the last dimension."""
    if count == affinity.shape[-1]:
        return 1.0
    ranked = affinity.double().sort(dim=-1, descending=True).values
    last, first_rejected = ranked[..., count - 1], ranked[..., count]
    return float(((last - first_rejected) / last).min())


def until_separated(make: Callable[[torch.Generator], tuple[Made, float]]) -> Made:
    """First of the seeds 0, 1, ... whose inputs have a gap of at least ``MIN_GAP``."""
    for seed in range(200):
        made, smallest = make(torch.Generator().manual_seed(seed))
        if smallest >= MIN_GAP:
            return made
    raise AssertionError("no seed gives a selection that rounding cannot change")


def top_mask(affinity: Tensor, count: int, dim: int) -> Tensor:
    """True for the ``count`` largest along ``dim``; ties to the lower index."""
    order = affinity.detach().sort(dim=dim, descending=True, stable=True).indices
    return torch.zeros_like(affinity, dtype=torch.bool).scatter(
        dim, order.narrow(dim, 0, count), True
    )


def expert_tokens(mask: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each expert of a (T, E) mask with its tokens in ascending order."""
    for expert in range(mask.shape[1]):
        yield expert, mask[:, expert].nonzero().flatten()


def rows_of_tokens(token_indices: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Row numbers of token 0, then of token 1, ..., and where each token's rows start."""
    rows: list[list[int]] = [[] for _ in range(num_tokens)]
    for row, token in enumerate(token_indices.tolist()):
        rows[token].append(row)
    starts = [0]
    for of_token in rows:
        starts.append(starts[-1] + len(of_token))
    return torch.tensor([row for of_token in rows for row in of_token]), torch.tensor(starts)
