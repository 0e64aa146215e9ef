"""Reference of ``moe_kernels.combine``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.plan import RoutingPlan


def combine(
    rows: Tensor,
    plan: RoutingPlan,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the rows of each token, plus shared and residual.

    ``F.embedding_bag`` over the token -> rows CSR is a gather-sum: unlike ``index_add`` it adds in
    a fixed order on every device. On 2 idle CPU cores, forward and backward, it took 0.64x
    (T 4096, D 128) and 0.32x (T 8192, D 384) of ``index_add``'s time.
    """
    dtype = torch.promote_types(rows.dtype, plan.routing_weights.dtype)
    if plan.num_rows == 0:
        zero = (rows.sum() + plan.routing_weights.sum()).to(dtype)
        out = zero * zero.new_zeros(plan.num_tokens, rows.shape[1])
    else:
        out = F.embedding_bag(
            plan.row_indices,
            rows.to(dtype),
            plan.row_offsets,
            mode="sum",
            per_sample_weights=plan.routing_weights.gather(0, plan.row_indices.long()).to(dtype),
            include_last_offset=True,
        )
    for term in (shared, residual):
        if term is not None:
            out = out + term.to(dtype)
    return out.to(rows.dtype)
