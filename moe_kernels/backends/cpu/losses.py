"""Similarity loss on the CPU; the routing kernels compute the other losses in their one pass."""

import torch
from torch import Tensor

from moe_kernels.backends.cpu.native import DTYPES, native
from moe_kernels.ops import route as ops


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


ops.similarity.implement("cpu", _similarity_kernel, ("cpu",))
ops.similarity_bwd.implement("cpu", _similarity_bwd_kernel, ("cpu",))
