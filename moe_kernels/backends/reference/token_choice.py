"""Reference of ``moe_kernels.token_choice``."""

import torch
from torch import Tensor

from moe_kernels.backends.reference.affinity import (
    compute_affinity,
    divide_by_sum,
    exclusive_offsets,
    invert_rows,
    ranking_key,
)
from moe_kernels.checks import check_finite_logits
from moe_kernels.plan import RoutingPlan


def token_choice(
    router_logits: Tensor,
    *,
    top_k: int,
    affinity: str,
    normalize: str,
    scale: float,
    selection_bias: Tensor | None,
    num_expert_groups: int,
    top_k_groups: int,
    num_groups: int,
    check_finite: bool,
) -> RoutingPlan:
    """Each token takes its ``top_k`` best experts; rows are stably sorted by expert."""
    if check_finite:
        check_finite_logits(router_logits)
    num_tokens, num_experts = router_logits.shape
    router_probs = compute_affinity(router_logits, affinity)
    key = ranking_key(router_probs)
    if selection_bias is not None:
        key = key + selection_bias.detach().to(key.dtype)
    if top_k_groups < num_expert_groups:
        key = keep_best_groups(key, num_expert_groups, top_k_groups)
    ranked = torch.sort(key, dim=-1, descending=True, stable=True).indices
    expert_indices = ranked[:, :top_k]  # (T, K)
    weights = router_probs.gather(1, expert_indices)
    if normalize == "per_token":
        weights = divide_by_sum(weights, weights.sum(dim=-1, keepdim=True))

    flat_experts = expert_indices.flatten()
    by_expert = torch.argsort(flat_experts, stable=True)  # row -> position in (T, K)
    token_indices = (by_expert // top_k).int()
    counts = torch.zeros(num_experts, dtype=torch.int32, device=router_logits.device)
    counts = counts.index_add(0, flat_experts, torch.ones_like(token_indices))
    row_indices, row_offsets = invert_rows(token_indices, num_tokens)
    return RoutingPlan(
        router="token_choice",
        affinity=affinity,
        num_tokens=num_tokens,
        num_experts=num_experts,
        num_groups=num_groups,
        top_k=top_k,
        capacity=None,
        router_logits=router_logits,
        routing_weights=weights.flatten().gather(0, by_expert) * scale,
        token_indices=token_indices,
        expert_offsets=exclusive_offsets(counts),
        tokens_per_expert=counts,
        row_indices=row_indices,
        row_offsets=row_offsets,
        expert_indices=expert_indices.int(),
    )


def keep_best_groups(key: Tensor, num_expert_groups: int, top_k_groups: int) -> Tensor:
    """Set the key of experts outside each token's best groups to -inf.

    A group's worth is the sum of its two best keys (its one key when it holds one expert).
    """
    grouped = key.unflatten(1, (num_expert_groups, -1))  # (T, groups, experts of a group)
    two_best = grouped.sort(dim=-1, descending=True).values[..., :2].sum(dim=-1)
    ranked = torch.sort(ranking_key(two_best), dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(two_best, dtype=torch.bool)
    keep = keep.scatter(1, ranked[:, :top_k_groups], True)
    return torch.where(keep.unsqueeze(-1), grouped, float("-inf")).flatten(1)
