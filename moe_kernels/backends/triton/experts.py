"""Expert MLP and grouped GEMM: the order of the kernels, forward and backward.

Kept for backward: x, h and the plan. a, the rows before combine, dh and d(rows) live inside one
call only.
"""

from typing import Any

from torch import Tensor

from moe_kernels.backends.triton.down_bwd import down_bwd
from moe_kernels.backends.triton.gemm_launch import empty_or_none, readable_or_none
from moe_kernels.backends.triton.launch import DEVICE_TYPES
from moe_kernels.backends.triton.rows import sum_rows
from moe_kernels.backends.triton.rows_gemm import rows_gemm
from moe_kernels.backends.triton.up_fwd import up_fwd
from moe_kernels.backends.triton.weight_bwd import bias_bwd, weight_bwd
from moe_kernels.ops import experts as ops
from moe_kernels.ops import parts
from moe_kernels.ops.layout import is_transposed, stored


def _expert_mlp(*inputs: Any) -> tuple[Tensor, Tensor]:
    tensors = map(readable_or_none, inputs[:12])
    x, weights, w_in, w_out, bias_in, bias_out, shared, residual, *indices = tensors
    token_indices, row_indices, row_offsets, expert_offsets = indices
    rows_per_expert, activation = inputs[12:]
    inner = w_out.shape[2]
    h, a = up_fwd(
        x, w_in, bias_in, token_indices, expert_offsets, rows_per_expert, inner, activation
    )
    w_out, transposed = stored(w_out)
    groups = (expert_offsets, rows_per_expert)
    y = rows_gemm(a, w_out, *groups, transposed=not transposed, bias=bias_out)
    del a  # before the output is allocated
    return sum_rows(y, weights, row_indices, row_offsets, shared, residual), h


def _expert_mlp_bwd(dout: Tensor, h: Tensor, wanted: list[bool], *inputs: Any) -> tuple[Any, ...]:
    dout, h = dout.contiguous(), h.contiguous()
    x, weights, w_in, w_out, bias_in, bias_out, *indices = map(readable_or_none, inputs[:10])
    token_indices, row_indices, row_offsets, expert_offsets = indices
    rows_per_expert, activation = inputs[10:]
    groups, tokens = (expert_offsets, rows_per_expert), {"token_indices": token_indices}
    want_x, want_weights, want_w_in, want_w_out, want_bias_in, want_bias_out = wanted
    dx = dw_in = dw_out = dbias_in = dbias_out = None
    dh, a, dweights = down_bwd(
        dout,
        h,
        weights,
        w_out,
        bias_in,
        bias_out,
        token_indices,
        expert_offsets,
        rows_per_expert,
        activation,
        store_a=want_w_out,
        gate_gradient=want_weights,
    )
    if a is not None:
        transposed = is_transposed(w_out)
        dw_out = weight_bwd(dout, a, *groups, **tokens, gather="p", transposed=transposed)
        del a
    if want_bias_out and bias_out is not None:
        dbias_out = bias_bwd(dout, bias_out, *groups, weights=weights, **tokens)
    if want_w_in:
        transposed = is_transposed(w_in)
        dw_in = weight_bwd(dh, x, *groups, **tokens, gather="q", transposed=transposed)
    if want_bias_in and bias_in is not None:
        dbias_in = bias_bwd(dh, bias_in, *groups)
    if want_x:
        w_in, transposed = stored(w_in)
        drows = rows_gemm(dh, w_in, *groups, transposed=transposed)
        del dh
        dx = sum_rows(drows, None, row_indices, row_offsets)
    gradients = (dx, dweights, dw_in, dw_out, dbias_in, dbias_out)
    return tuple(empty_or_none(gradient, x) for gradient in gradients)


def _grouped_gemm(rows: Tensor, w: Tensor, expert_offsets: Tensor, rows_per_expert: int) -> Tensor:
    rows, w, expert_offsets = map(readable_or_none, (rows, w, expert_offsets))
    w, transposed = stored(w)
    return rows_gemm(rows, w, expert_offsets, rows_per_expert, transposed=not transposed)


def _grouped_gemm_bwd(
    dout: Tensor,
    wanted: list[bool],
    rows: Tensor,
    w: Tensor,
    expert_offsets: Tensor,
    rows_per_expert: int,
) -> tuple[Tensor, Tensor]:
    dout, rows, w, expert_offsets = map(readable_or_none, (dout, rows, w, expert_offsets))
    groups = (expert_offsets, rows_per_expert)
    w, transposed = stored(w)
    drows = rows_gemm(dout, w, *groups, transposed=transposed) if wanted[0] else None
    dw = weight_bwd(dout, rows, *groups, transposed=transposed) if wanted[1] else None
    return empty_or_none(drows, rows), empty_or_none(dw, rows)


ops.expert_mlp.implement("triton", _expert_mlp, DEVICE_TYPES)
ops.expert_mlp_bwd.implement("triton", _expert_mlp_bwd, DEVICE_TYPES)
ops.grouped_gemm.implement("triton", _grouped_gemm, DEVICE_TYPES)
ops.grouped_gemm_bwd.implement("triton", _grouped_gemm_bwd, DEVICE_TYPES)
parts.implement("triton", _expert_mlp, _expert_mlp_bwd, DEVICE_TYPES)
