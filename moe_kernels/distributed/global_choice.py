"""Stage 1 over several ranks: experts (or pairs) choose from the tokens of all of them."""

from typing import Any

import torch
from torch import Tensor, distributed

from moe_kernels.backends import resolve
from moe_kernels.backends.reference.affinity import compute_affinity
from moe_kernels.checks import check_choice, check_floating, wants_finite_check
from moe_kernels.distributed.groups import remember
from moe_kernels.distributed.search import count_over_ranks, global_search
from moe_kernels.plan import RoutingPlan
from moe_kernels.router import _check_expert_choice as check_expert_choice
from moe_kernels.router import _run_check as run_check
from moe_kernels.selection import plan_from_selection

_AFFINITIES = ("softmax", "sigmoid", "identity")
# Histograms count in int32.
_MOST_PAIRS = 2**31 - 1


def global_expert_choice(
    router_logits: Tensor,
    capacity_factor: float | None = None,
    *,
    process_group: distributed.ProcessGroup,
    capacity: int | None = None,
    num_tokens_global: int | None = None,
    affinity: str = "softmax",
    normalize: str = "none",
    scale: float = 1.0,
    rounding: str = "floor",
    multiple_of: int = 1,
    num_groups: int = 1,
    check_finite: bool | None = None,
) -> RoutingPlan:
    """Let each expert take its C best of the tokens of all ranks, exactly.

    The pool is the tokens of rank 0, then of rank 1, ...: each expert takes the C with the largest
    affinity (equal affinities: lower rank, then lower token first; NaN ranks with -inf), as
    ``expert_choice(num_groups=1)`` would from all logits in one process. Each rank gets the plan of
    its own tokens, and an expert may have any number of rows in it. With ``capacity_factor`` f_c,
    C = max(1, round(T f_c / E)) for the T tokens of all ranks.

    No scores travel: 4 all-reduces (8 for fp64) of (E, 256) int32 and one all-gather of (E + 3,)
    int32; without ``num_tokens_global`` also an all-reduce of a number. The device is waited for
    once, for the number of rows (and once for the number of tokens).

    Args:
        router_logits: (T_local, E) floating point, differentiable; T_local may differ from rank to
            rank and be 0.
        capacity_factor: f_c, average experts per token; 2.0 when neither it nor ``capacity`` is
            given.
        process_group: the ranks of the pool; all of them must call this with the same options.
        capacity: C itself, tokens per expert of all ranks; not together with ``capacity_factor``.
        num_tokens_global: tokens of all ranks, where the caller knows them: saves a message. A
            wrong number on any rank raises on all.
        num_groups: number of sequences in T_local; only the per-sequence balance loss reads it.
        affinity, normalize, scale, rounding, multiple_of: see ``moe_kernels.expert_choice``.
        check_finite: as for ``expert_choice``; where one rank has bad logits, all raise.

    Returns:
        A ``RoutingPlan`` with ``router="selection"`` of this rank's tokens.

    Raises:
        ValueError: bad shape, dtype, size or option, non-finite logits on any rank, or a
            ``num_tokens_global`` that is not the number of tokens.

    Source: EC-DiT (arXiv 2410.02098), Algorithm 1, over a pool of several devices.
    """
    check_floating("router_logits", router_logits, 2, "(num_tokens, num_experts)")
    if num_tokens_global is None:
        num_tokens_global = global_num_tokens(router_logits, process_group)
    capacity = run_check(
        check_expert_choice,
        *(num_tokens_global, router_logits.shape[1], capacity_factor, capacity, 1),
        *(affinity, normalize, rounding, multiple_of),
    )
    logits = _wide(router_logits)
    # What the backend of this device ranks and weighs by in one process.
    affinities = resolve("router_probs", logits.device, None)(logits, affinity)
    chosen, _, num_rows, _ = _search(
        affinities, capacity, logits, process_group, num_tokens_global, check_finite
    )
    return plan_from_selection(
        chosen,
        logits,
        num_rows=num_rows,
        affinity=affinity,
        normalize=normalize,
        scale=scale,
        gates=affinities,
        num_groups=num_groups,
        check_finite=False,
    )


def global_pair_choice(
    router_logits: Tensor,
    num_rows: int,
    *,
    process_group: distributed.ProcessGroup,
    num_tokens_global: int | None = None,
    affinity: str = "identity",
    normalize: str = "none",
    scale: float = 1.0,
    num_groups: int = 1,
    check_finite: bool | None = None,
) -> RoutingPlan:
    """Take the best ``num_rows`` of all token-expert pairs of all ranks, exactly.

    As ``pair_choice`` would from all logits in one process (equal: lower rank, then lower token,
    then lower expert first). Each rank gets the plan of its own tokens.

    Args:
        router_logits: (T_local, E) floating point; T_local may differ from rank to rank and be 0.
        num_rows: R of all ranks together, from 0 to T · E, the same on every rank.
        process_group: the ranks; all of them must call this with the same options.
        num_tokens_global: T, where the caller knows it: it is then checked.
        affinity, normalize, scale, num_groups: see ``moe_kernels.pair_choice``.
        check_finite: as for ``expert_choice``; where one rank has bad logits, all raise.

    Returns:
        A ``RoutingPlan`` of this rank's tokens.

    Raises:
        ValueError: bad shape, dtype or option, ``num_rows`` out of range, or non-finite logits on
            any rank.

    Source: Expert Race (arXiv 2503.16057), section 3, over a pool of several devices.
    """
    options: dict[str, Any] = {
        "affinity": affinity,
        "normalize": normalize,
        "scale": scale,
        "num_groups": num_groups,
        "check_finite": check_finite,
    }
    return pair_choice_and_threshold(
        router_logits, num_rows, process_group, num_tokens_global, **options
    )[0]


def pair_choice_and_threshold(
    router_logits: Tensor,
    num_rows: int,
    process_group: distributed.ProcessGroup,
    num_tokens_global: int | None = None,
    *,
    affinity: str = "identity",
    check_finite: bool | None = None,
    **options: Any,
) -> tuple[RoutingPlan, Tensor]:
    """``global_pair_choice``, and its smallest winning affinity, a scalar without gradient."""
    check_floating("router_logits", router_logits, 2, "(num_tokens, num_experts)")
    check_choice("affinity", affinity, _AFFINITIES)
    if not isinstance(num_rows, int) or not 0 <= num_rows <= _MOST_PAIRS:
        raise ValueError(f"num_rows is {num_rows!r}; expected an integer, 0 to {_MOST_PAIRS}.")
    logits = _wide(router_logits)
    pairs = compute_affinity(logits, affinity).view(-1, 1)
    chosen, smallest, num_local, num_tokens = _search(
        pairs, num_rows, logits, process_group, num_tokens_global, check_finite
    )
    num_pairs = num_tokens * logits.shape[1]
    if num_pairs > _MOST_PAIRS:
        raise ValueError(
            f"the ranks have {num_pairs} pairs; expected at most {_MOST_PAIRS}: let fewer ranks "
            "share a pool."
        )
    if num_rows > num_pairs:
        raise ValueError(
            f"num_rows is {num_rows}; expected 0 to the {num_pairs} pairs that all ranks have "
            "together."
        )
    plan = plan_from_selection(
        chosen.view_as(logits),
        logits,
        num_rows=num_local,
        affinity=affinity,
        check_finite=False,
        **options,
    )
    return plan, smallest.squeeze(0)


def global_kth_largest(
    values: Tensor, k: int, *, process_group: distributed.ProcessGroup
) -> Tensor:
    """The k-th largest value of each column over the rows of all ranks.

    Nothing is asked of the device. NaN counts as -inf.

    Args:
        values: (N, M) floating point; N may differ from rank to rank and be 0.
        k: from 1 to the number of rows of all ranks, the same on every rank.
        process_group: the ranks.

    Returns:
        (M,) in fp32 (fp64 for fp64 values), the same on every rank, without gradient.
    """
    check_floating("values", values, 2, "(rows, columns)")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}; expected an integer of at least 1.")
    nothing = torch.zeros(0, dtype=torch.int32, device=values.device)
    return global_search(_wide(values), k, remember(process_group), nothing)[1]


def global_num_tokens(router_logits: Tensor, process_group: distributed.ProcessGroup) -> int:
    """Tokens of all ranks together: one message, and a wait for the device."""
    return count_over_ranks(router_logits.shape[0], router_logits.device, remember(process_group))


def _search(
    values: Tensor,
    k: int,
    logits: Tensor,
    process_group: distributed.ProcessGroup,
    num_tokens_global: int | None,
    check_finite: bool | None,
) -> tuple[Tensor, Tensor, int, int]:
    """Chosen values, the smallest by column, how many were chosen here, and tokens of all ranks.

    What is to be checked travels with the counts of ties to all ranks, so that all raise or none.
    """
    promised = -1 if num_tokens_global is None else num_tokens_global
    header = torch.tensor([logits.shape[0], promised, 0], dtype=torch.int32)
    header = header.to(logits.device, non_blocking=True)
    if wants_finite_check(logits, check_finite):
        header[2] = (~torch.isfinite(logits)).sum()
    chosen, smallest, headers = global_search(values, k, remember(process_group), header)
    num_rows, *numbers = torch.cat([chosen.sum().view(1), headers.T.flatten()]).tolist()
    ranks = distributed.get_world_size(process_group)
    tokens, promises, not_finite = (numbers[i * ranks : (i + 1) * ranks] for i in range(3))
    if any(not_finite):
        here = not_finite[distributed.get_rank(process_group)]
        raise ValueError(
            f"router_logits have {sum(not_finite)} non-finite values on all ranks, {here} of them "
            f"on rank {distributed.get_rank(process_group)} of the pool; expected finite logits. "
            "The router or its input has diverged. Pass check_finite=False to route anyway (NaN "
            "ranks last)."
        )
    num_tokens = sum(tokens)
    if wrong := sorted({promise for promise in promises if promise not in (-1, num_tokens)}):
        raise ValueError(
            f"num_tokens_global is {' or '.join(map(str, wrong))}, but the ranks have {num_tokens} "
            f"tokens, {min(tokens)} to {max(tokens)} each; give their number on all ranks, or None."
        )
    return chosen, smallest, num_rows, num_tokens


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
