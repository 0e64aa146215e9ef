"""Stage 5 over several ranks: losses and telemetry of the tokens of all of them.

Each loss is scaled so that the mean over the ranks of what they return is the loss of all tokens in
one process, gradients included (those of the ranks are summed and divided by their number), also
where ranks have different numbers of tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from moe_kernels.backends.reference.losses import selection_mask
from moe_kernels.distributed.groups import sum_over_ranks
from moe_kernels.losses import check_logits, load_balance_loss, router_z_loss
from moe_kernels.plan import RoutingPlan
from moe_kernels.telemetry import RoutingStats, routing_stats


class GlobalCounts(NamedTuple):
    """What all ranks routed, for each layer.

    Attributes:
        num_tokens: (layers,) int64, T.
        tokens_per_expert: (E,) int64 each, rows of each expert.
        chosen_together: (E, E) int64 each, tokens that both experts took (on the diagonal: that the
            expert took); empty unless asked for.
        num_ranks: ranks that were counted.
    """

    num_tokens: Tensor
    tokens_per_expert: list[Tensor]
    chosen_together: list[Tensor]
    num_ranks: int


def global_counts(
    plans: Sequence[RoutingPlan],
    process_group: distributed.ProcessGroup,
    *,
    chosen_together: bool = False,
) -> GlobalCounts:
    """Count the rows of all ranks, in one all-reduce for all layers.

    Args:
        plans: the routing of each layer on this rank, the same layers on every rank; at least one.
        process_group: the ranks.
        chosen_together: also count pairs of experts, which the similarity loss needs.

    Raises:
        ValueError: no plans.
    """
    if not plans:
        raise ValueError("plans is empty; expected the plan of at least one MoE layer.")
    device = plans[0].tokens_per_expert.device
    tokens = torch.tensor([plan.num_tokens for plan in plans]).to(device, non_blocking=True)
    rows = [plan.tokens_per_expert.long() for plan in plans]
    pairs = [_chosen_together(plan) for plan in plans] if chosen_together else []
    sums = sum_over_ranks([tokens, *rows, *pairs], process_group)
    layers = len(plans)
    return GlobalCounts(
        sums[0],
        sums[1 : layers + 1],
        sums[layers + 1 :],
        distributed.get_world_size(process_group),
    )


def global_tokens_per_expert(
    plans: Sequence[RoutingPlan], process_group: distributed.ProcessGroup
) -> list[Tensor]:
    """Rows of each expert (E,) int64 over all ranks, for each layer, in one all-reduce."""
    if not plans:
        return []
    return sum_over_ranks([plan.tokens_per_expert.long() for plan in plans], process_group)


def global_load_balance_loss(
    plans: Sequence[RoutingPlan],
    process_group: distributed.ProcessGroup,
    *,
    tokens_per_expert: Sequence[Tensor] | None = None,
    counts: GlobalCounts | None = None,
) -> list[Tensor]:
    """``load_balance_loss`` of the tokens of all ranks.

    On rank r of W: ``Σ_e f_e · P_e`` with f of all ranks and ``P_e = W/T · Σ_{t on r} p[t, e]``.

    Args:
        plans: the routing of each layer on this rank.
        process_group: the ranks.
        tokens_per_expert: (E,) for each layer, rows over a pool that is still larger (the
            micro-batches of a step), of all ranks already.
        counts: of ``global_counts``, where the caller has them; else they are counted.

    Returns:
        For each layer a scalar, whose mean over the ranks is the loss.
    """
    counts = counts or global_counts(plans, process_group)
    rows = counts.tokens_per_expert if tokens_per_expert is None else tokens_per_expert
    losses = [
        load_balance_loss(plan, tokens_per_expert=rows[layer]) for layer, plan in enumerate(plans)
    ]
    return _weighted(losses, plans, counts)


def global_router_z_loss(
    plans: Sequence[RoutingPlan],
    process_group: distributed.ProcessGroup,
    *,
    counts: GlobalCounts | None = None,
) -> list[Tensor]:
    """``router_z_loss`` of the tokens of all ranks, for each layer.

    Arguments and result as for ``global_load_balance_loss``.
    """
    counts = counts or global_counts(plans, process_group)
    return _weighted([router_z_loss(plan) for plan in plans], plans, counts)


def global_router_similarity_loss(
    plans: Sequence[RoutingPlan],
    process_group: distributed.ProcessGroup,
    *,
    counts: GlobalCounts | None = None,
) -> list[Tensor]:
    """``router_similarity_loss`` of the tokens of all ranks, for each layer.

    On rank r of W: ``W/T · Σ_ij W_ij (P_rᵀP_r)_ij`` with the weights W_ij from the co-selections
    of all ranks. Arguments and result as for ``global_load_balance_loss``.

    Raises:
        ValueError: ``counts`` without ``chosen_together``.

    Source: Expert Race (arXiv 2503.16057), section 5.
    """
    counts = counts or global_counts(plans, process_group, chosen_together=True)
    if len(counts.chosen_together) != len(plans):
        raise ValueError(
            f"counts have chosen_together of {len(counts.chosen_together)} layers; expected "
            f"{len(plans)}: call global_counts with chosen_together=True."
        )
    losses = []
    for plan, together in zip(plans, counts.chosen_together, strict=True):
        check_logits(plan)
        probs = torch.softmax(plan.router_logits, dim=-1)
        weights = _pair_weights(together).to(probs.dtype)
        losses.append((weights * (probs.T @ probs)).sum() / max(plan.num_tokens, 1))
    return _weighted(losses, plans, counts)


@torch.no_grad()
def global_routing_stats(
    plans: Sequence[RoutingPlan], process_group: distributed.ProcessGroup
) -> list[RoutingStats]:
    """``routing_stats`` of the tokens of all ranks, for each layer, in one all-reduce.

    Returns:
        As ``routing_stats``, with ``tokens_per_expert`` in int64; the same on every rank.
    """
    sums: list[Tensor] = []
    for plan in plans:
        stats, tokens = routing_stats(plan), plan.num_tokens
        # Counts are exact in fp64, so that one message carries all of it.
        sums += [
            stats.tokens_per_expert.double(),
            stats.mean_prob.double() * tokens,
            stats.entropy.double().view(1) * tokens,
            stats.experts_per_token_histogram.double(),
        ]
    totals = iter(sum_over_ranks(sums, process_group))
    results = []
    for plan in plans:
        rows, probs, entropy, histogram = next(totals), next(totals), next(totals), next(totals)
        num_tokens = histogram.sum().clamp_min(1)
        dtype = plan.router_logits.dtype
        results.append(
            RoutingStats(
                tokens_per_expert=rows.long(),
                mean_prob=(probs / num_tokens).to(dtype),
                entropy=(entropy / num_tokens).squeeze(0).to(dtype),
                unrouted_fraction=(histogram[0] / num_tokens).float(),
                experts_per_token_histogram=histogram.long(),
            )
        )
    return results


def _weighted(
    losses: Sequence[Tensor], plans: Sequence[RoutingPlan], counts: GlobalCounts
) -> list[Tensor]:
    """Means over this rank's tokens, so weighted that the mean over ranks is that of all tokens."""
    totals = counts.num_tokens.clamp_min(1)
    return [
        loss * (plan.num_tokens * counts.num_ranks / totals[layer].to(loss.dtype))
        for layer, (loss, plan) in enumerate(zip(losses, plans, strict=True))
    ]


@torch.no_grad()
def _chosen_together(plan: RoutingPlan) -> Tensor:
    """(E, E) int64 counts; exact in fp32 up to 2^24 tokens."""
    mask = selection_mask(plan)
    return (mask.T @ mask).round().long()


def _pair_weights(together: Tensor) -> Tensor:
    """(E, E) fp64 weights of the similarity loss; diagonal and rest average 1 each."""
    counts = together.double()
    own = torch.diagonal(counts)
    pairs = counts - torch.diag(own)
    experts = counts.shape[0]
    weights = torch.diag(own) * (experts / own.sum().clamp_min(1))
    return weights + pairs * ((experts * experts - experts) / pairs.sum().clamp_min(1))
