"""One GEMM an expert over ragged rows; the loops behind ``torch.ops.moe_kernels.ragged_gemm``."""

from itertools import pairwise

import torch
from torch import Tensor


def gemm_operand(tensor: Tensor) -> Tensor:
    """On a CPU the specification multiplies 16-bit operands in fp32 and rounds the result once.

    Their speed there depends on the processor (with AMX, bf16 took 0.2x to 0.3x and fp16 0.5x to
    1.1x of fp32's time), their accuracy should not.
    """
    if tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor.float()
    return tensor


def host_offsets(expert_offsets: Tensor, num_rows: int) -> list[int]:
    """Offsets on the host, checked: rows outside every expert would stay uninitialised."""
    offsets = expert_offsets.tolist()
    if offsets[0] != 0 or offsets[-1] != num_rows or offsets != sorted(offsets):
        raise ValueError(
            f"expert_offsets is {offsets}; expected values that start at 0, never fall, and end at "
            f"the {num_rows} rows given."
        )
    return offsets


def ragged_gemm_fwd(rows: Tensor, w: Tensor, expert_offsets: Tensor) -> Tensor:
    """out[r] = w[e(r)] @ rows[r]; rows (R, I), w (E, O, I) -> (R, O)."""
    offsets = host_offsets(expert_offsets, rows.shape[0])
    out = rows.new_empty(rows.shape[0], w.shape[1])
    wide_rows, wide_w = gemm_operand(rows), gemm_operand(w)
    for expert, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            out[start:end] = wide_rows[start:end] @ wide_w[expert].T
    return out


def ragged_gemm_bwd(
    dout: Tensor, rows: Tensor, w: Tensor, expert_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """drows[r] = w[e]^T @ dout[r]; dw[e] = dout_e^T @ rows_e, zero for an expert without rows."""
    offsets = host_offsets(expert_offsets, rows.shape[0])
    drows, dw = torch.empty_like(rows), torch.zeros_like(w)
    wide_dout, wide_rows, wide_w = gemm_operand(dout), gemm_operand(rows), gemm_operand(w)
    for expert, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            drows[start:end] = wide_dout[start:end] @ wide_w[expert]
            dw[expert] = wide_dout[start:end].T @ wide_rows[start:end]
    return drows, dw
