"""Reference of ``moe_kernels.expert_choice``."""

import torch
from torch import Tensor

from moe_kernels.backends.reference.affinity import (
    compute_affinity,
    divide_by_sum,
    invert_rows,
    ranking_key,
)
from moe_kernels.checks import check_finite_logits
from moe_kernels.plan import RoutingPlan


def expert_choice(
    router_logits: Tensor,
    *,
    capacity: int,
    num_groups: int,
    affinity: str,
    normalize: str,
    scale: float,
    check_finite: bool,
) -> RoutingPlan:
    """Each expert takes its ``capacity`` best tokens of every group; rows lie (E, G, C)."""
    if check_finite:
        check_finite_logits(router_logits)
    num_tokens, num_experts = router_logits.shape
    group_size = num_tokens // num_groups
    device = router_logits.device
    router_probs = compute_affinity(router_logits, affinity)

    def by_expert(values: Tensor) -> Tensor:  # (T, E) -> (E, G, S)
        return values.view(num_groups, group_size, num_experts).permute(2, 0, 1)

    key = ranking_key(by_expert(router_probs))
    best = torch.sort(key, dim=-1, descending=True, stable=True).indices
    chosen = best[..., :capacity].sort(dim=-1).values  # (E, G, C), in token order
    group_start = torch.arange(num_groups, device=device).view(1, -1, 1) * group_size
    token_indices = (chosen + group_start).flatten().int()
    weights = router_probs
    if normalize == "per_token":
        # Summed and divided as dense (T, E), so that no order of additions is left to chance,
        # forward or backward; the gather below meets each element at most once.
        expert_of_row = torch.arange(num_experts, device=device).repeat_interleave(
            num_groups * capacity
        )
        held = torch.zeros_like(router_probs, dtype=torch.bool)
        held = held.index_put((token_indices, expert_of_row), held.new_ones(()))
        weights = torch.where(held, router_probs, 0.0)
        weights = divide_by_sum(weights, weights.sum(dim=-1, keepdim=True))
    weights = by_expert(weights).gather(2, chosen).flatten()

    row_indices, row_offsets = invert_rows(token_indices, num_tokens)
    rows = num_groups * capacity
    return RoutingPlan(
        router="expert_choice",
        affinity=affinity,
        num_tokens=num_tokens,
        num_experts=num_experts,
        num_groups=num_groups,
        top_k=None,
        capacity=capacity,
        router_logits=router_logits,
        routing_weights=weights * scale,
        token_indices=token_indices,
        expert_offsets=torch.arange(num_experts + 1, dtype=torch.int32, device=device) * rows,
        tokens_per_expert=torch.full((num_experts,), rows, dtype=torch.int32, device=device),
        row_indices=row_indices,
        row_offsets=row_offsets,
        expert_indices=None,
    )
