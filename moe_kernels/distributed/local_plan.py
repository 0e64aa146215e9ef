"""The plan by which a rank runs its experts over the rows that it received.

Rows arrive by rank, and those of one rank by expert. Each is a token of one row and of weight 1:
``expert_mlp`` then reads and writes rows where they lie, and no pass is spent on their order.
"""

import torch
from torch import Tensor

from moe_kernels.plan import RoutingPlan


def static_plan(world_size: int, num_experts: int, rows: int, device: torch.device) -> RoutingPlan:
    """Plan of equal groups: each rank sends ``rows`` rows to each of ``num_experts`` experts."""
    num_rows = world_size * num_experts * rows
    places = torch.arange(num_rows, dtype=torch.int32, device=device)
    by_rank = places.view(world_size, num_experts, rows)
    by_expert = places.view(num_experts, world_size, rows)
    return _plan(
        token_indices=by_rank.transpose(0, 1).flatten(),
        row_indices=by_expert.transpose(0, 1).flatten(),
        tokens_per_expert=torch.full(
            (num_experts,), world_size * rows, dtype=torch.int32, device=device
        ),
        expert_offsets=_multiples(num_experts + 1, world_size * rows, device),
        num_groups=world_size,
        capacity=rows,
    )


def ragged_plan(counts: Tensor, num_rows: int) -> RoutingPlan:
    """Plan of any rows.

    Args:
        counts: (W, E_local) int32, rows from each rank for each expert.
        num_rows: their sum, known on the host.
    """
    by_expert = counts.T
    tokens_per_expert = by_expert.sum(1, dtype=torch.int32)
    ends_by_rank = counts.flatten().cumsum(0, dtype=torch.int32).view_as(counts)
    ends_by_expert = by_expert.flatten().cumsum(0, dtype=torch.int32).view_as(by_expert)
    # How much further down the rows of a rank for an expert lie in expert order.
    shifts = ends_by_expert.T - ends_by_rank
    places = torch.arange(num_rows, dtype=torch.int32, device=counts.device)
    return _plan(
        token_indices=places - _repeat(shifts.T, by_expert, num_rows),
        row_indices=places + _repeat(shifts, counts, num_rows),
        tokens_per_expert=tokens_per_expert,
        expert_offsets=torch.cat([counts.new_zeros(1), ends_by_expert[:, -1]]),
        num_groups=1,
        capacity=None,
    )


def _repeat(values: Tensor, times: Tensor, total: int) -> Tensor:
    """The values, each as many times; the sum of these is given so that nobody waits for it."""
    return values.flatten().repeat_interleave(times.flatten(), output_size=total)


def _multiples(count: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device) * step


def _plan(
    *,
    token_indices: Tensor,
    row_indices: Tensor,
    tokens_per_expert: Tensor,
    expert_offsets: Tensor,
    num_groups: int,
    capacity: int | None,
) -> RoutingPlan:
    num_rows, device = token_indices.shape[0], token_indices.device
    return RoutingPlan(
        router="selection" if capacity is None else "expert_choice",
        affinity="given",
        num_tokens=num_rows,
        num_experts=tokens_per_expert.shape[0],
        num_groups=num_groups,
        top_k=None,
        capacity=capacity,
        router_logits=torch.empty(0, device=device),
        routing_weights=torch.ones(num_rows, device=device),
        token_indices=token_indices,
        expert_offsets=expert_offsets,
        tokens_per_expert=tokens_per_expert,
        row_indices=row_indices,
        row_offsets=_multiples(num_rows + 1, 1, device),
        expert_indices=None,
    )
