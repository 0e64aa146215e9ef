"""Stage 1 when somebody else has chosen: a ``RoutingPlan`` from expert indices and weights."""

import torch
from torch import Tensor

from moe_kernels.checks import (
    check_floating,
    check_positive_int,
    check_same_device,
    check_shape,
)
from moe_kernels.plan import RoutingPlan


def plan_from_choices(
    expert_indices: Tensor, routing_weights: Tensor, num_experts: int
) -> RoutingPlan:
    """Make the plan of a token choice that a model's own router has made.

    Row r of token t and its k-th expert gets the weight ``routing_weights[t, k]``; rows are stably
    sorted by expert. Nothing is asked of the device, so indices out of range are not noticed.

    Args:
        expert_indices: (T, K) integers in [0, E).
        routing_weights: (T, K) floating point, differentiable.
        num_experts: E.

    Returns:
        A ``RoutingPlan`` for ``expert_mlp``, ``dispatch`` and ``combine``. It has no logits
        (``router_logits`` is (T, 0)), so that losses and telemetry refuse it.

    Raises:
        ValueError: mismatched shapes, dtypes or devices.
    """
    check_floating("routing_weights", routing_weights, 2, "(num_tokens, top_k)")
    check_positive_int("num_experts", num_experts)
    if not isinstance(expert_indices, Tensor):
        raise ValueError(
            f"expert_indices is a {type(expert_indices).__name__}; expected a torch.Tensor "
            "(num_tokens, top_k)."
        )
    if expert_indices.is_floating_point() or expert_indices.dtype == torch.bool:
        raise ValueError(f"expert_indices is {expert_indices.dtype}; expected integers.")
    shape = (routing_weights.shape[0], routing_weights.shape[1])
    check_shape("expert_indices", expert_indices, shape, "as routing_weights")
    check_same_device("expert_indices", expert_indices, "routing_weights", routing_weights)
    num_tokens, top_k = shape
    wide = torch.promote_types(routing_weights.dtype, torch.float32)
    by_expert, choice = torch.sort(expert_indices.flatten().int(), stable=True)  # (R,)
    bounds = torch.arange(num_experts + 1, dtype=torch.int32, device=by_expert.device)
    offsets = torch.searchsorted(by_expert, bounds, out_int32=True)  # (E + 1,)
    rows = torch.arange(by_expert.shape[0], dtype=torch.int32, device=by_expert.device)
    row_of_choice = torch.empty_like(rows).scatter(0, choice, rows).view(num_tokens, top_k)
    return RoutingPlan(
        router="token_choice",
        affinity="given",
        num_tokens=num_tokens,
        num_experts=num_experts,
        num_groups=1,
        top_k=top_k,
        capacity=None,
        router_logits=routing_weights.new_empty((num_tokens, 0), dtype=wide),
        routing_weights=routing_weights.flatten().gather(0, choice).to(wide),
        token_indices=(choice // top_k).int(),
        expert_offsets=offsets,
        tokens_per_expert=offsets.diff(),
        row_indices=row_of_choice.sort(dim=-1).values.flatten(),
        row_offsets=torch.arange(num_tokens + 1, dtype=torch.int32, device=rows.device) * top_k,
        expert_indices=expert_indices.int(),
    )
