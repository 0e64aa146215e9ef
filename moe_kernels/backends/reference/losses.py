"""Reference of the router losses."""

import torch
from torch import Tensor

from moe_kernels.backends.reference.affinity import divide_by_sum
from moe_kernels.plan import RoutingPlan


def routing_distribution(plan: RoutingPlan) -> Tensor:
    """(T, E) affinities as a distribution over experts."""
    if plan.affinity == "softmax":
        return plan.router_probs
    if plan.affinity == "sigmoid":
        return divide_by_sum(plan.router_probs, plan.router_probs.sum(dim=-1, keepdim=True))
    return torch.softmax(plan.router_logits, dim=-1)


def selection_mask(plan: RoutingPlan) -> Tensor:
    """(T, E) 1 where the expert processes the token, in the precision of the logits."""
    mask = torch.zeros_like(plan.router_logits)
    return mask.index_put((plan.token_indices, plan.expert_of_row), mask.new_ones(()))


def load_balance_loss(
    plan: RoutingPlan, per_sequence: bool, tokens_per_expert: Tensor | None
) -> Tensor:
    """Mean over pools of sum_e f_e P_e; one pool, or one for each sequence."""
    pools = plan.num_groups if per_sequence else 1
    probs = routing_distribution(plan).view(pools, plan.num_tokens // pools, plan.num_experts)
    if tokens_per_expert is None:
        rows = selection_mask(plan).view_as(probs).sum(dim=1)  # (pools, E)
    else:
        rows = tokens_per_expert.to(probs.dtype).unsqueeze(0)
    frequency = rows * (plan.num_experts / rows.sum(dim=1, keepdim=True).clamp_min(1))
    mean_prob = probs.sum(dim=1) * (pools / max(plan.num_tokens, 1))
    return (frequency * mean_prob).sum() / pools


def router_z_loss(plan: RoutingPlan) -> Tensor:
    """Mean squared logsumexp of the logits."""
    return torch.logsumexp(plan.router_logits, dim=-1).square().sum() / max(plan.num_tokens, 1)


def router_similarity_loss(plan: RoutingPlan) -> Tensor:
    """Gram matrix of the softmax, weighted by normalised co-selection."""
    probs = torch.softmax(plan.router_logits, dim=-1)
    mask = selection_mask(plan)
    together = mask.T @ mask  # (E, E)
    own = torch.diagonal(together)
    pairs = together - torch.diag(own)
    experts = plan.num_experts
    weights = torch.diag(own) * (experts / own.sum().clamp_min(1))
    weights = weights + pairs * ((experts * experts - experts) / pairs.sum().clamp_min(1))
    return (weights * (probs.T @ probs)).sum() / max(plan.num_tokens, 1)
