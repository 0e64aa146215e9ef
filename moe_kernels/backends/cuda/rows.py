"""Dispatch and combine in CUDA C++; each is the backward of the other."""

import torch
from torch import Tensor

from moe_kernels.backends.cuda.native import DEVICE_TYPES, DTYPES, address, native, place
from moe_kernels.ops import rows as ops


def _indices(name: str, indices: Tensor) -> Tensor:
    """Indices as the kernels read them; a plan that somebody built may have others."""
    if indices.dtype != torch.int32:
        raise ValueError(f"{name} of the plan has dtype {indices.dtype}; expected torch.int32.")
    return indices.contiguous()


def _weights(weights: Tensor | None) -> Tensor | None:
    if weights is None:
        return None
    assert weights.dtype == torch.float32, weights.dtype
    return weights.contiguous()


def _gather(
    x: Tensor, token_indices: Tensor, weights: Tensor | None, values: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, weights = x.contiguous(), _weights(weights)
    token_indices = _indices("token_indices", token_indices)
    rows = x.new_empty(token_indices.shape[0], x.shape[1])
    dweights = None
    if values is not None:
        assert weights is not None
        assert values.dtype == x.dtype, (values.dtype, x.dtype)
        values, dweights = values.contiguous(), torch.empty_like(weights)
    native.gather(
        *place(x),
        DTYPES[x.dtype],
        x.data_ptr(),
        address(values),
        address(weights),
        token_indices.data_ptr(),
        rows.data_ptr(),
        address(dweights),
        *rows.shape,
    )
    return rows, x.new_empty(0) if dweights is None else dweights


def _sum_rows(
    rows: Tensor,
    weights: Tensor | None,
    row_indices: Tensor,
    row_offsets: Tensor,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    if any(term is not None and term.dtype != rows.dtype for term in (shared, residual)):
        # The kernel reads one dtype. In fp32 nothing is lost, and the sum is still rounded once.
        terms = (None if term is None else term.float() for term in (shared, residual))
        return _sum_rows(rows.float(), weights, row_indices, row_offsets, *terms).to(rows.dtype)
    rows, weights = rows.contiguous(), _weights(weights)
    row_indices = _indices("row_indices", row_indices)
    row_offsets = _indices("row_offsets", row_offsets)
    shared = None if shared is None else shared.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = rows.new_empty(row_offsets.shape[0] - 1, rows.shape[1])
    native.sum_rows(
        *place(rows),
        DTYPES[rows.dtype],
        rows.data_ptr(),
        address(weights),
        row_indices.data_ptr(),
        row_offsets.data_ptr(),
        address(shared),
        address(residual),
        out.data_ptr(),
        *out.shape,
    )
    return out


def _dispatch(x: Tensor, token_indices: Tensor, row_indices: Tensor, row_offsets: Tensor) -> Tensor:
    return _gather(x, token_indices, None, None)[0]


def _combine(
    rows: Tensor,
    weights: Tensor,
    shared: Tensor | None,
    residual: Tensor | None,
    token_indices: Tensor,
    row_indices: Tensor,
    row_offsets: Tensor,
) -> Tensor:
    return _sum_rows(rows, weights, row_indices, row_offsets, shared, residual)


ops.gather.implement("cuda", _gather, DEVICE_TYPES)
ops.sum_rows.implement("cuda", _sum_rows, DEVICE_TYPES)
ops.dispatch.implement("cuda", _dispatch, DEVICE_TYPES)
ops.combine.implement("cuda", _combine, DEVICE_TYPES)
