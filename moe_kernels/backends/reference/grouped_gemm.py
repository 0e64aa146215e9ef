"""Reference of ``moe_kernels.grouped_gemm``."""

import torch
from torch import Tensor

from moe_kernels.backends.reference.ragged_gemm import gemm_operand
from moe_kernels.ops.ragged_gemm import ragged_gemm


def grouped_gemm(
    rows: Tensor, w: Tensor, expert_offsets: Tensor, rows_per_expert: int | None
) -> Tensor:
    """One batched GEMM for equal groups, else one GEMM an expert.

    Ragged groups need the offsets on the host. Behind a ``torch.library`` op that read is opaque
    to ``torch.compile``, which therefore keeps the layer in one graph.
    """
    if rows_per_expert is None:
        return ragged_gemm(rows, w, expert_offsets)
    grouped = gemm_operand(rows).view(w.shape[0], rows_per_expert, rows.shape[1])
    out = torch.bmm(grouped, gemm_operand(w).transpose(1, 2))
    return out.reshape(rows.shape[0], w.shape[1]).to(rows.dtype)
