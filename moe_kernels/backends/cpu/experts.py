"""Expert MLP and grouped GEMM on the CPU."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels.backends.cpu import fallback
from moe_kernels.backends.cpu.memory import empty
from moe_kernels.backends.cpu.native import (
    ACTIVATIONS,
    DTYPES,
    address,
    check_indices,
    native,
)
from moe_kernels.backends.cpu.products import PRODUCTS
from moe_kernels.backends.cpu.rows import add_terms
from moe_kernels.backends.reference.ragged_gemm import host_offsets
from moe_kernels.ops import experts as ops
from moe_kernels.ops import parts
from moe_kernels.ops.layout import is_transposed, readable


def _readable(tensors: tuple[Any, ...]) -> list[Any]:
    return [readable(t) if isinstance(t, Tensor) else t for t in tensors]


def _empty_gradient(tensor: Tensor) -> Tensor:
    if is_transposed(tensor):
        return empty(tensor.transpose(1, 2).shape, tensor.dtype).transpose(1, 2)
    return empty(tensor.shape, tensor.dtype)


def _sizes(x: Tensor, w_out: Tensor, token_indices: Tensor) -> list[int]:
    experts, hidden, intermediate = w_out.shape
    return [x.shape[0], experts, token_indices.shape[0], hidden, intermediate]


def _check(x: Tensor, indices: tuple[Tensor, ...]) -> None:
    token_indices, row_indices, row_offsets, expert_offsets = indices
    check_indices("token_indices", token_indices, x.shape[0])
    check_indices("row_indices", row_indices, token_indices.shape[0])
    check_indices("row_offsets", row_offsets, row_indices.shape[0] + 1)
    host_offsets(expert_offsets, token_indices.shape[0])
    check_indices("expert_offsets", expert_offsets, token_indices.shape[0] + 1)


def _mlp_kernel(*inputs: Any) -> tuple[Tensor, Tensor]:
    return _mlp(inputs, keep_h=True)


def _mlp_inference(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Without h, the largest tensor of all, which only the backward reads."""
    return _mlp(inputs, keep_h=False)


def _mlp(inputs: tuple[Any, ...], keep_h: bool) -> tuple[Tensor, Tensor]:
    inputs = tuple(_readable(inputs))
    x, weights, w_in, w_out, bias_in, bias_out, shared, residual, *indices, _, activation = inputs
    _check(x, tuple(indices))
    if not PRODUCTS.serve(x.dtype):
        out, h = fallback.expert_mlp_fwd(*inputs[:6], *indices, activation=activation)
        return add_terms(out, shared, residual), h
    out = empty(x.shape, x.dtype)
    h = empty((indices[0].shape[0] if keep_h else 0, w_in.shape[1]), x.dtype)
    parts = [x, w_in, w_out, bias_in, bias_out, weights, *indices, h if keep_h else None]
    native.expert_mlp_fwd(
        DTYPES[x.dtype],
        ACTIVATIONS[activation],
        bool(PRODUCTS.bf16),
        [is_transposed(w_in), is_transposed(w_out)],
        [address(part) for part in parts],
        _sizes(x, w_out, indices[0]),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return add_terms(out, shared, residual), h


def _mlp_bwd_kernel(
    dout: Tensor, h: Tensor, wanted: list[bool], *inputs: Any
) -> tuple[Tensor, ...]:
    dout, h, *inputs = _readable((dout, h, *inputs))  # type: ignore[assignment]
    x, weights, w_in, w_out, bias_in, bias_out, *indices, _, activation = inputs
    if not PRODUCTS.serve(x.dtype):
        return fallback.expert_mlp_bwd(
            dout, h, wanted, *inputs[:6], *indices, activation=activation
        )
    differentiable = (x, weights, w_in, w_out, bias_in, bias_out)
    gradients = tuple(
        x.new_empty(0) if tensor is None or not want else _empty_gradient(tensor)
        for tensor, want in zip(differentiable, wanted, strict=True)
    )
    addresses = [
        address(gradient) if tensor is not None and want else 0
        for gradient, tensor, want in zip(gradients, differentiable, wanted, strict=True)
    ]
    dx, dweights, *others = addresses
    parts = [x, w_in, w_out, bias_in, bias_out, weights, *indices, h]
    native.expert_mlp_bwd(
        DTYPES[x.dtype],
        ACTIVATIONS[activation],
        bool(PRODUCTS.bf16),
        [is_transposed(w_in), is_transposed(w_out)],
        [address(part) for part in parts],
        _sizes(x, w_out, indices[0]),
        [dout.data_ptr(), dx, *others, dweights],
        torch.get_num_threads(),
    )
    return gradients


def _gemm_kernel(rows: Tensor, w: Tensor, expert_offsets: Tensor, rows_per_expert: int) -> Tensor:
    rows, w, expert_offsets = _readable((rows, w, expert_offsets))
    host_offsets(expert_offsets, rows.shape[0])
    if not PRODUCTS.serve(rows.dtype):
        return fallback.grouped_gemm_fwd(rows, w, expert_offsets)
    out = empty((rows.shape[0], w.shape[1]), rows.dtype)
    native.grouped_gemm_fwd(
        DTYPES[rows.dtype],
        bool(PRODUCTS.bf16),
        is_transposed(w),
        rows.data_ptr(),
        w.data_ptr(),
        expert_offsets.data_ptr(),
        out.data_ptr(),
        w.shape[0],
        rows.shape[0],
        w.shape[2],
        w.shape[1],
        torch.get_num_threads(),
    )
    return out


def _gemm_bwd_kernel(
    dout: Tensor,
    wanted: list[bool],
    rows: Tensor,
    w: Tensor,
    expert_offsets: Tensor,
    rows_per_expert: int,
) -> tuple[Tensor, Tensor]:
    dout, rows, w, expert_offsets = _readable((dout, rows, w, expert_offsets))
    if not PRODUCTS.serve(rows.dtype):
        return fallback.grouped_gemm_bwd(dout, wanted, rows, w, expert_offsets)
    drows = empty(rows.shape, rows.dtype) if wanted[0] else rows.new_empty(0)
    dw = _empty_gradient(w) if wanted[1] else rows.new_empty(0)
    native.grouped_gemm_bwd(
        DTYPES[rows.dtype],
        bool(PRODUCTS.bf16),
        is_transposed(w),
        rows.data_ptr(),
        w.data_ptr(),
        expert_offsets.data_ptr(),
        dout.data_ptr(),
        drows.data_ptr() if wanted[0] else 0,
        dw.data_ptr() if wanted[1] else 0,
        w.shape[0],
        rows.shape[0],
        w.shape[2],
        w.shape[1],
        torch.get_num_threads(),
    )
    return drows, dw


ops.expert_mlp.implement("cpu", _mlp_kernel, ("cpu",), inference=_mlp_inference)
ops.expert_mlp_bwd.implement("cpu", _mlp_bwd_kernel, ("cpu",))
ops.grouped_gemm.implement("cpu", _gemm_kernel, ("cpu",))
ops.grouped_gemm_bwd.implement("cpu", _gemm_bwd_kernel, ("cpu",))
parts.implement("cpu", _mlp_kernel, _mlp_bwd_kernel, ("cpu",), inference=_mlp_inference)
