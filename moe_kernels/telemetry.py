"""Router telemetry: how a plan spread its tokens, as tensors on the plan's device."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.backends.reference.losses import routing_distribution
from moe_kernels.losses import check_logits
from moe_kernels.ops.route import ENTROPY, MEAN_PROB
from moe_kernels.plan import FusedRouting, RoutingPlan


class RoutingStats(NamedTuple):
    """Statistics of one plan; nothing here synchronises the device.

    Attributes:
        tokens_per_expert: (E,) int32, rows of each expert.
        mean_prob: (E,) mean routing probability of each expert over the tokens.
        entropy: scalar, mean entropy of the routing distribution of a token, in nats.
        unrouted_fraction: scalar, share of tokens that no expert took.
        experts_per_token_histogram: (E + 1,) int64, tokens that 0, 1, ..., E experts took.
    """

    tokens_per_expert: Tensor
    mean_prob: Tensor
    entropy: Tensor
    unrouted_fraction: Tensor
    experts_per_token_histogram: Tensor


def routing_stats(plan: RoutingPlan) -> RoutingStats:
    """Compute ``RoutingStats`` of a plan, without gradient.

    The entropy is ``-1/T · Σ_t Σ_e p[t, e] log p[t, e]`` with p as in ``load_balance_loss``.
    """
    check_logits(plan)
    if plan.fused is not None:
        return _fused_stats(plan, plan.fused)
    with torch.no_grad():
        probs = routing_distribution(plan)
        tokens = max(plan.num_tokens, 1)
        entropy = -torch.special.xlogy(probs, probs).sum() / tokens
        experts_per_token = plan.experts_per_token.long()
        histogram = torch.zeros(plan.num_experts + 1, dtype=torch.long, device=probs.device)
        histogram = histogram.index_add(0, experts_per_token, torch.ones_like(experts_per_token))
        return RoutingStats(
            tokens_per_expert=plan.tokens_per_expert,
            mean_prob=probs.sum(dim=0) / tokens,
            entropy=entropy,
            unrouted_fraction=histogram[0] / tokens,
            experts_per_token_histogram=histogram,
        )


def _fused_stats(plan: RoutingPlan, fused: FusedRouting) -> RoutingStats:
    """The same from what the routing kernel counted."""
    terms, histogram = fused.terms.detach(), plan.packed_indices.histogram
    return RoutingStats(
        tokens_per_expert=plan.tokens_per_expert,
        mean_prob=terms[MEAN_PROB:],
        entropy=terms[ENTROPY],
        unrouted_fraction=histogram[0] / max(plan.num_tokens, 1),
        experts_per_token_histogram=histogram.long(),
    )
