"""Stage 1 for any selection: a ``RoutingPlan`` from a table of which expert takes which token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels.backends.reference.affinity import (
    compute_affinity,
    divide_by_sum,
    exclusive_offsets,
    invert_rows,
    ranking_key,
)
from moe_kernels.checks import (
    check_choice,
    check_finite_logits,
    check_floating,
    check_positive_int,
    check_same_device,
    check_shape,
    wants_finite_check,
)
from moe_kernels.plan import RoutingPlan

_AFFINITIES = ("softmax", "sigmoid", "identity")


def plan_from_selection(
    chosen: Tensor,
    router_logits: Tensor,
    *,
    num_rows: int | None = None,
    affinity: str = "softmax",
    normalize: str = "none",
    scale: float = 1.0,
    gates: Tensor | None = None,
    num_groups: int = 1,
    check_finite: bool | None = None,
) -> RoutingPlan:
    """Make the plan of any selection of token-expert pairs, with logits for losses and telemetry.

    Rows lie in expert order, and inside an expert in token order. The weight of the row of token t
    and expert e is ``scale · A[t, e]`` with ``A = affinity(router_logits)`` (or ``gates``), divided
    by its sum over the experts that hold t when ``normalize="per_token"``. Experts and tokens may
    have any number of rows, none too.

    Args:
        chosen: (T, E) bool, True where the expert processes the token.
        router_logits: (T, E) floating point, differentiable.
        num_rows: R, the number of True values, where the caller knows it: nothing is then asked of
            the device. ``None`` counts them, which waits for the device.
        affinity: ``"softmax"`` over experts, ``"sigmoid"`` or ``"identity"``.
        normalize: ``"none"`` or ``"per_token"`` (not for identity affinity without ``gates``).
        scale: multiplies every routing weight.
        gates: (T, E) floating point, differentiable: takes the place of the affinity in the
            weights; losses and telemetry read the logits all the same.
        num_groups: number of sequences in T; only the per-sequence balance loss reads it.
        check_finite: see ``expert_choice``.

    Returns:
        A ``RoutingPlan`` with ``router="selection"``.

    Raises:
        ValueError: bad shape, dtype or option, or (eager, on the CPU) a ``num_rows`` that is not
            the number of True values, or non-finite logits.
    """
    check_floating("router_logits", router_logits, 2, "(num_tokens, num_experts)")
    num_tokens, num_experts = router_logits.shape
    _check_chosen(chosen, router_logits)
    check_choice("affinity", affinity, _AFFINITIES)
    check_choice("normalize", normalize, ("none", "per_token"))
    check_positive_int("num_groups", num_groups)
    if affinity == "identity" and normalize == "per_token" and gates is None:
        raise ValueError(
            'normalize is "per_token" with affinity "identity"; raw logits can sum to 0, '
            'so use affinity "softmax" or "sigmoid", or normalize "none".'
        )
    if num_tokens % num_groups:
        raise ValueError(f"num_groups {num_groups} does not divide the {num_tokens} tokens.")
    if gates is not None:
        check_floating("gates", gates, 2, "(num_tokens, num_experts)")
        check_shape("gates", gates, (num_tokens, num_experts), "as router_logits")
        check_same_device("gates", gates, "router_logits", router_logits)
    logits = _wide(router_logits)
    if wants_finite_check(logits, check_finite):
        check_finite_logits(logits)
    num_rows = _count_rows(chosen, num_rows)

    pairs = _chosen_pairs(chosen, num_rows)  # (R,) e·T + t, ascending
    token_indices = (pairs % max(num_tokens, 1)).int()
    counts = chosen.sum(dim=0, dtype=torch.int32)
    row_indices, row_offsets = invert_rows(token_indices, num_tokens)
    weights = compute_affinity(logits, affinity) if gates is None else _wide(gates)
    if normalize == "per_token":
        weights = torch.where(chosen, weights, 0.0)
        weights = divide_by_sum(weights, weights.sum(dim=-1, keepdim=True))
    return RoutingPlan(
        router="selection",
        affinity=affinity,
        num_tokens=num_tokens,
        num_experts=num_experts,
        num_groups=num_groups,
        top_k=None,
        capacity=None,
        router_logits=logits,
        # Each pair is gathered once, so that the backward adds in no order that is left to chance.
        routing_weights=weights.T.flatten().gather(0, pairs) * scale,
        token_indices=token_indices,
        expert_offsets=exclusive_offsets(counts),
        tokens_per_expert=counts,
        row_indices=row_indices,
        row_offsets=row_offsets,
        expert_indices=None,
    )


def expert_choice_per_group(
    router_logits: Tensor,
    capacities: Sequence[int],
    *,
    affinity: str = "softmax",
    normalize: str = "none",
    scale: float = 1.0,
    check_finite: bool | None = None,
) -> RoutingPlan:
    """Expert choice where every group has a capacity of its own.

    Each expert takes the ``capacities[g]`` tokens of group g with the largest affinity (equal:
    lower token index first; NaN ranks with -inf), as ``expert_choice`` does with one capacity. The
    capacities are host integers, so that nothing is asked of the device.

    Args:
        router_logits: (T, E) floating point, T = G · S, groups contiguous.
        capacities: C of each of the G groups, from 0 to S.
        affinity, normalize, scale, check_finite: see ``expert_choice``.

    Returns:
        A ``RoutingPlan`` with R = E · Σ_g C_g rows, in token order inside an expert.

    Raises:
        ValueError: bad shape, dtype or option, or a capacity below 0 or above S.
    """
    check_floating("router_logits", router_logits, 2, "(num_tokens, num_experts)")
    check_choice("affinity", affinity, _AFFINITIES)
    num_tokens, num_experts = router_logits.shape
    num_groups = len(capacities)
    if num_groups == 0 or num_tokens % num_groups:
        raise ValueError(
            f"{num_groups} capacities for {num_tokens} tokens; expected one for each group, and "
            "groups of equal size."
        )
    group_size = num_tokens // num_groups
    if any(not 0 <= capacity <= group_size for capacity in capacities):
        raise ValueError(f"capacities are {list(capacities)}; expected 0 to {group_size} each.")
    key = ranking_key(compute_affinity(_wide(router_logits), affinity))
    by_expert = key.view(num_groups, group_size, num_experts).permute(2, 0, 1)  # (E, G, S)
    order = torch.sort(by_expert, dim=-1, descending=True, stable=True).indices
    limits = torch.tensor(list(capacities)).to(key.device, non_blocking=True).view(1, -1, 1)
    within = torch.arange(group_size, device=key.device) < limits
    taken = torch.zeros_like(by_expert, dtype=torch.bool)
    taken = taken.scatter(2, order, within.expand_as(order))
    return plan_from_selection(
        taken.permute(1, 2, 0).reshape(num_tokens, num_experts),
        router_logits,
        num_rows=num_experts * sum(capacities),
        affinity=affinity,
        normalize=normalize,
        scale=scale,
        num_groups=num_groups,
        check_finite=check_finite,
    )


def pair_choice(
    router_logits: Tensor,
    num_rows: int,
    *,
    affinity: str = "identity",
    normalize: str = "none",
    scale: float = 1.0,
    num_groups: int = 1,
    check_finite: bool | None = None,
) -> RoutingPlan:
    """Take the best ``num_rows`` of all token-expert pairs.

    Pairs are compared by ``affinity(router_logits)`` (equal: lower token index first, then lower
    expert index; NaN ranks with -inf). Experts and tokens may get any number of rows, none too.

    Args:
        router_logits: (T, E) floating point.
        num_rows: R, from 0 to T · E; Expert Race takes T · k.
        affinity: ``"identity"`` (Expert Race), ``"softmax"`` over experts or ``"sigmoid"``.
        normalize, scale, num_groups, check_finite: see ``plan_from_selection``.

    Returns:
        A ``RoutingPlan`` with R rows, in token order inside an expert.

    Raises:
        ValueError: bad shape, dtype or option, or ``num_rows`` out of range.

    Source: Expert Race (arXiv 2503.16057), section 3.
    """
    check_floating("router_logits", router_logits, 2, "(num_tokens, num_experts)")
    check_choice("affinity", affinity, _AFFINITIES)
    if not 0 <= num_rows <= router_logits.numel():
        raise ValueError(
            f"num_rows is {num_rows}; expected 0 to the {router_logits.numel()} pairs there are."
        )
    key = ranking_key(compute_affinity(_wide(router_logits), affinity)).flatten()
    order = torch.sort(key, descending=True, stable=True).indices
    chosen = torch.zeros_like(key, dtype=torch.bool)
    chosen = chosen.scatter(0, order[:num_rows], True)
    return plan_from_selection(
        chosen.view_as(router_logits),
        router_logits,
        num_rows=num_rows,
        affinity=affinity,
        normalize=normalize,
        scale=scale,
        num_groups=num_groups,
        check_finite=check_finite,
    )


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _check_chosen(chosen: object, router_logits: Tensor) -> None:
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool:
        given = chosen.dtype if isinstance(chosen, Tensor) else type(chosen).__name__
        raise ValueError(f"chosen is {given}; expected a torch.bool tensor like router_logits.")
    check_shape("chosen", chosen, tuple(router_logits.shape), "as router_logits")
    check_same_device("chosen", chosen, "router_logits", router_logits)


def _count_rows(chosen: Tensor, num_rows: int | None) -> int:
    if num_rows is None:
        return int(chosen.sum())
    if chosen.device.type == "cpu" and not torch.compiler.is_compiling():
        counted = int(chosen.sum())
        if counted != num_rows:
            raise ValueError(f"num_rows is {num_rows}, but chosen has {counted} True values.")
    return num_rows


def _chosen_pairs(chosen: Tensor, num_rows: int) -> Tensor:
    """(R,) int64 places of the True values in ``chosen.T``, ascending, without asking the device.

    Each True value writes its place to its rank; all others write to one place behind the rows,
    which is cut off.
    """
    flat = chosen.T.flatten()
    rank = flat.cumsum(0) - 1
    target = torch.where(flat, rank, num_rows).clamp(max=num_rows)
    places = torch.arange(flat.shape[0], device=flat.device)
    return places.new_zeros(num_rows + 1).scatter(0, target, places)[:num_rows]
