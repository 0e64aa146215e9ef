"""Unequal use of the experts in token choice: who takes which, and logits that make it so."""

import torch
from torch import Tensor

SKEWS = ("uniform", "zipf", "collapsed")


def shares(skew: str, experts: int, top_k: int) -> Tensor:
    """(E,) share of the tokens that each expert is to have; they sum to K.

    ``"zipf"``: proportional to 1, 1/2, 1/3, ..., where that is no more than every token;
    ``"collapsed"``: K experts have all tokens, the others none; ``"uniform"``: K/E.

    Raises:
        ValueError: for another word.
    """
    if skew not in SKEWS:
        raise ValueError(f"skew is {skew!r}; expected one of {', '.join(SKEWS)}.")
    if skew == "uniform":
        return torch.full((experts,), top_k / experts, dtype=torch.float64)
    found = torch.zeros(experts, dtype=torch.float64)
    if skew == "collapsed":
        found[:top_k] = 1
        return found
    weights = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    full = 0  # experts that every token takes
    while full < top_k and weights[full] * (top_k - full) > weights[full:].sum():
        full += 1
    found[:full] = 1
    if full < top_k:
        found[full:] = weights[full:] * (top_k - full) / weights[full:].sum()
    return found


def skewed_logits(logits: Tensor, skew: str, top_k: int, generator: torch.Generator) -> Tensor:
    """Each token's numbers in another order, so that its K largest stand at drawn experts.

    The numbers themselves, and with them the gaps between them, stay as they are.

    Args:
        logits: (T, E) random numbers.
        skew: ``"zipf"`` or ``"collapsed"``.
        top_k: K.
        generator: of the draws.
    """
    tokens, experts = logits.shape
    wanted = shares(skew, experts, top_k).to(logits.device)
    # Points at a distance of 1 from a random start fall into K different experts, each as often
    # as it is wide.
    starts = torch.rand((tokens, 1), generator=generator, device=logits.device).double()
    points = starts + torch.arange(top_k, device=logits.device)
    ends = wanted.cumsum(0).contiguous()
    chosen = torch.searchsorted(ends, points, right=True).clamp_max(experts - 1)
    # Drawn experts in front in random order, the others behind them in random order.
    order = torch.rand(logits.shape, generator=generator, device=logits.device)
    order = order.scatter_add(1, chosen, order.new_ones(chosen.shape)).argsort(1, descending=True)
    return torch.empty_like(logits).scatter(1, order, logits.sort(1, descending=True).values)


def skewed_tokens(
    x: Tensor, router: Tensor, skew: str, top_k: int, generator: torch.Generator
) -> Tensor:
    """Tokens moved inside the span of the router's rows, so that their logits are skewed.

    Args:
        x: (T, D) random tokens.
        router: (E, D) weights, E at most D.
        skew, top_k, generator: as for ``skewed_logits``.
    """
    rows = router.double()
    logits = x.double() @ rows.T
    change = skewed_logits(logits, skew, top_k, generator) - logits
    return (x + torch.linalg.solve(rows @ rows.T, change.T).T @ rows).to(x.dtype)


def load(affinity: Tensor, top_k: int) -> float:
    """Rows of the fullest expert over those of an average one: 1 in balance, E/K collapsed."""
    tokens, experts = affinity.shape
    chosen = affinity.topk(top_k, dim=-1).indices.flatten()
    return float(torch.bincount(chosen, minlength=experts).max()) * experts / (tokens * top_k)
