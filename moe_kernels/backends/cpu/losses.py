"""Router losses on the CPU: the routing kernels have computed them in their one pass."""

import torch
from torch import Tensor

from moe_kernels.backends.cpu.native import DTYPES, native
from moe_kernels.backends.reference import losses as reference
from moe_kernels.ops import route as ops
from moe_kernels.plan import RoutingPlan


def load_balance_loss(
    plan: RoutingPlan, per_sequence: bool, tokens_per_expert: Tensor | None
) -> Tensor:
    """See ``moe_kernels.load_balance_loss``."""
    fused = plan.fused
    if fused is None:  # a plan of another backend
        return reference.load_balance_loss(plan, per_sequence, tokens_per_expert)
    if tokens_per_expert is not None:
        mean_prob = fused.terms[ops.MEAN_PROB :]
        rows = tokens_per_expert.to(mean_prob.dtype)
        return (rows * (plan.num_experts / rows.sum().clamp_min(1)) * mean_prob).sum()
    return fused.terms[ops.BALANCE_PER_GROUP] if per_sequence else fused.load_balance


def router_z_loss(plan: RoutingPlan) -> Tensor:
    """See ``moe_kernels.router_z_loss``."""
    return reference.router_z_loss(plan) if plan.fused is None else plan.fused.z_loss


def _similarity_kernel(
    router_logits: Tensor, row_experts: Tensor, row_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    logits = router_logits.contiguous()
    experts = logits.shape[1]
    loss, pair_weights = logits.new_empty(()), logits.new_empty(experts, experts)
    native.similarity_fwd(
        DTYPES[logits.dtype],
        logits.data_ptr(),
        row_experts.data_ptr(),
        row_offsets.data_ptr(),
        pair_weights.data_ptr(),
        loss.data_ptr(),
        *logits.shape,
        torch.get_num_threads(),
    )
    return loss, pair_weights


def _similarity_bwd_kernel(router_logits: Tensor, pair_weights: Tensor, dloss: Tensor) -> Tensor:
    logits = router_logits.contiguous()
    dlogits = torch.empty_like(logits)
    native.similarity_bwd(
        DTYPES[logits.dtype],
        logits.data_ptr(),
        pair_weights.data_ptr(),
        dloss.data_ptr(),
        dlogits.data_ptr(),
        *logits.shape,
        torch.get_num_threads(),
    )
    return dlogits


ops.similarity.implement("cpu", _similarity_kernel)
ops.similarity_bwd.implement("cpu", _similarity_bwd_kernel)


def router_similarity_loss(plan: RoutingPlan) -> Tensor:
    """See ``moe_kernels.router_similarity_loss``."""
    if plan.fused is None:
        return reference.router_similarity_loss(plan)
    row_experts = plan.packed_indices.row_experts
    return ops.similarity(plan.router_logits, row_experts, plan.row_offsets)[0]
