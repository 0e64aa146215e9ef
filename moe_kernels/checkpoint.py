"""Activation checkpointing that saves the routing instead of recomputing it."""

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from moe_kernels.ops import route
from moe_kernels.ops.operator import Operator

# The routers of the compiled backends are one op each. Every selection of the reference is a sort;
# all other index tensors follow from its result.
_SAVED = [route.token_choice, route.expert_choice]
_SORTS = (
    torch.ops.aten.sort.default,
    torch.ops.aten.sort.stable,
    torch.ops.aten.argsort.stable,
    torch.ops.aten.topk.default,
)


def always_save(*operators: Operator) -> None:
    """Add ops whose results are saved wherever the routing is."""
    _SAVED.extend(operators)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in _SORTS or any(operator.owns(op) for operator in _SAVED):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def save_routing_context_fn() -> tuple[Any, Any]:
    """Contexts for ``torch.utils.checkpoint.checkpoint(..., context_fn=save_routing_context_fn)``.

    A recomputed forward may round differently (other kernels, other fusion) and then choose other
    tokens than the forward did, which silently corrupts gradients. With these contexts the result
    of the routing is saved and only the rest is recomputed; the reference saves its sorted
    affinities and indices too, about 12 bytes a token and expert. Needs ``use_reentrant=False``.
    """
    return create_selective_checkpoint_contexts(_policy)
