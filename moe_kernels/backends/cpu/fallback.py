"""The expert kernels where C++ cannot reach a BLAS: products by PyTorch, the rest in C++.

Routing, activation with bias and routing weight, gate gradient and sums are the same kernels; only
the products are one call an expert. 16-bit operands are multiplied in fp32.
"""

from itertools import pairwise

import torch
from torch import Tensor

from moe_kernels.backends.cpu.native import ACTIVATIONS, DTYPES, address, native
from moe_kernels.backends.reference.ragged_gemm import ragged_gemm_bwd, ragged_gemm_fwd
from moe_kernels.backends.stages import wide_dtype


def grouped_gemm_fwd(rows: Tensor, w: Tensor, expert_offsets: Tensor) -> Tensor:
    """out[r] = w[e(r)] @ rows[r]."""
    return ragged_gemm_fwd(rows, w, expert_offsets)


def grouped_gemm_bwd(
    dout: Tensor, wanted: list[bool], rows: Tensor, w: Tensor, expert_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Both gradients, or an empty tensor where one is not wanted."""
    drows, dw = ragged_gemm_bwd(dout, rows, w, expert_offsets)
    nothing = rows.new_empty(0)
    return drows if wanted[0] else nothing, dw if wanted[1] else nothing


def _sum_rows(rows: Tensor, row_indices: Tensor, row_offsets: Tensor) -> Tensor:
    out = rows.new_empty(row_offsets.shape[0] - 1, rows.shape[1])
    native.combine(
        DTYPES[rows.dtype],
        rows.data_ptr(),
        0,
        row_indices.data_ptr(),
        row_offsets.data_ptr(),
        out.data_ptr(),
        *out.shape,
        torch.get_num_threads(),
    )
    return out


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """16-bit tensors in fp32."""
    return [None if t is None else t.to(wide_dtype(t.dtype)) for t in tensors]


def expert_mlp_fwd(
    x: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    token_indices: Tensor,
    row_indices: Tensor,
    row_offsets: Tensor,
    expert_offsets: Tensor,
    *,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """See ``moe_kernels.ops.experts.expert_mlp``."""
    dtype = x.dtype
    x, w_in, w_out, bias_in, bias_out = _wide(x, w_in, w_out, bias_in, bias_out)  # type: ignore[assignment]
    h = ragged_gemm_fwd(x.index_select(0, token_indices), w_in, expert_offsets)
    a = h.new_empty(h.shape[0], w_out.shape[2])
    native.activation_fwd(
        DTYPES[h.dtype],
        ACTIVATIONS[activation],
        h.data_ptr(),
        address(bias_in),
        weights.data_ptr(),
        expert_offsets.data_ptr(),
        a.data_ptr(),
        h.shape[0],
        w_in.shape[0],
        a.shape[1],
        torch.get_num_threads(),
    )
    y = ragged_gemm_fwd(a, w_out, expert_offsets)
    if bias_out is not None:
        y += weights.unsqueeze(1) * bias_out.repeat_interleave(expert_offsets.diff(), 0)
    return _sum_rows(y, row_indices, row_offsets).to(dtype), h.to(dtype)


def expert_mlp_bwd(
    dout: Tensor,
    h: Tensor,
    wanted: list[bool],
    x: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    token_indices: Tensor,
    row_indices: Tensor,
    row_offsets: Tensor,
    expert_offsets: Tensor,
    *,
    activation: str,
) -> tuple[Tensor, ...]:
    """See ``moe_kernels.ops.experts.expert_mlp_bwd``."""
    dtype = x.dtype
    dout, h, x, w_in, w_out, bias_in, bias_out = _wide(  # type: ignore[assignment]
        dout, h, x, w_in, w_out, bias_in, bias_out
    )
    dy = dout.index_select(0, token_indices)
    rows = x.index_select(0, token_indices)
    offsets = expert_offsets.tolist()
    da = h.new_empty(h.shape[0], w_out.shape[2])
    for expert, (start, end) in enumerate(pairwise(offsets)):
        torch.mm(dy[start:end], w_out[expert], out=da[start:end])
    a, dh, dweights = torch.empty_like(da), torch.empty_like(h), torch.empty_like(weights)
    native.activation_bwd(
        DTYPES[h.dtype],
        ACTIVATIONS[activation],
        h.data_ptr(),
        address(bias_in),
        weights.data_ptr(),
        expert_offsets.data_ptr(),
        a.data_ptr(),
        da.data_ptr(),
        dh.data_ptr(),
        dweights.data_ptr(),
        h.shape[0],
        w_in.shape[0],
        da.shape[1],
        torch.get_num_threads(),
    )
    drows, dw_in = ragged_gemm_bwd(dh, rows, w_in, expert_offsets)
    dw_out = torch.zeros_like(w_out)
    dbias_in = x.new_empty(0) if bias_in is None else torch.zeros_like(bias_in)
    dbias_out = x.new_empty(0) if bias_out is None else torch.zeros_like(bias_out)
    for expert, (start, end) in enumerate(pairwise(offsets)):
        torch.mm(dy[start:end].T, a[start:end], out=dw_out[expert])
        if bias_in is not None:
            dbias_in[expert] = dh[start:end].sum(0)
        if bias_out is not None:
            dbias_out[expert] = weights[start:end] @ dy[start:end]
            dweights[start:end] += dy[start:end] @ bias_out[expert]
    dx = _sum_rows(drows, row_indices, row_offsets)
    gradients = (dx, dweights, dw_in, dw_out, dbias_in, dbias_out)
    return tuple(
        (g if i == 1 else g.to(dtype)) if want else x.new_empty(0).to(dtype)
        for i, (g, want) in enumerate(zip(gradients, wanted, strict=True))
    )
