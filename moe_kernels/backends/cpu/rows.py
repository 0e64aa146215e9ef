"""Dispatch and combine on the CPU."""

import torch
from torch import Tensor

from moe_kernels.backends.cpu.memory import empty
from moe_kernels.backends.cpu.native import DTYPES, address, check_indices, native
from moe_kernels.backends.stages import wide_dtype
from moe_kernels.ops import rows as ops


def _gather_kernel(
    x: Tensor, token_indices: Tensor, weights: Tensor | None, values: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, token_indices = x.contiguous(), token_indices.contiguous()
    values = None if values is None else values.contiguous()
    check_indices("token_indices", token_indices, x.shape[0])
    rows = empty((token_indices.shape[0], x.shape[1]), x.dtype)
    dweights = None
    if values is not None:
        assert weights is not None
        dweights = torch.empty_like(weights)
    native.gather(
        DTYPES[x.dtype],
        x.data_ptr(),
        address(values),
        address(weights),
        token_indices.data_ptr(),
        rows.data_ptr(),
        address(dweights),
        *rows.shape,
        torch.get_num_threads(),
    )
    return rows, x.new_empty(0) if dweights is None else dweights


def _sum_rows_kernel(
    rows: Tensor, weights: Tensor | None, row_indices: Tensor, row_offsets: Tensor
) -> Tensor:
    rows, row_indices = rows.contiguous(), row_indices.contiguous()
    row_offsets = row_offsets.contiguous()
    check_indices("row_indices", row_indices, rows.shape[0])
    check_indices("row_offsets", row_offsets, row_indices.shape[0] + 1)
    out = empty((row_offsets.shape[0] - 1, rows.shape[1]), rows.dtype)
    native.combine(
        DTYPES[rows.dtype],
        rows.data_ptr(),
        address(weights),
        row_indices.data_ptr(),
        row_offsets.data_ptr(),
        out.data_ptr(),
        *out.shape,
        torch.get_num_threads(),
    )
    return out


def _dispatch_kernel(
    x: Tensor, token_indices: Tensor, row_indices: Tensor, row_offsets: Tensor
) -> Tensor:
    # A copy of rows runs at the speed of memory: PyTorch's gather is as fast as one of ours.
    return x.index_select(0, token_indices)


def _combine_kernel(
    rows: Tensor,
    weights: Tensor,
    shared: Tensor | None,
    residual: Tensor | None,
    token_indices: Tensor,
    row_indices: Tensor,
    row_offsets: Tensor,
) -> Tensor:
    out = _sum_rows_kernel(rows, weights.contiguous(), row_indices, row_offsets)
    return add_terms(out, shared, residual)


def add_terms(out: Tensor, shared: Tensor | None, residual: Tensor | None) -> Tensor:
    """out + shared + residual in fp32 (fp64), rounded once."""
    terms = [term for term in (shared, residual) if term is not None]
    if not terms:
        return out
    wide = out.to(wide_dtype(out.dtype))
    for term in terms:
        wide = wide + term
    return wide.to(out.dtype)


ops.gather.implement("cpu", _gather_kernel, ("cpu",))
ops.sum_rows.implement("cpu", _sum_rows_kernel, ("cpu",))
ops.dispatch.implement("cpu", _dispatch_kernel, ("cpu",))
ops.combine.implement("cpu", _combine_kernel, ("cpu",))
