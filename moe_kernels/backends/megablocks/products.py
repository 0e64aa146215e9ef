"""Products of ragged rows with the experts' matrices, by megablocks' grouped product.

``gmm`` takes contiguous bf16 tensors, and reads on the host how many rows each expert has.
"""

import torch
from torch import Tensor

from moe_kernels.backends.megablocks.library import find_gmm
from moe_kernels.ops.layout import is_transposed, readable, stored


def host_sizes(expert_offsets: Tensor) -> Tensor:
    """(E,) int64 on the host, rows of each expert: one copy that the host waits for."""
    return expert_offsets.diff().cpu().long()


def forward(rows: Tensor, w: Tensor, sizes: Tensor) -> Tensor:
    """out[r] = w[e(r)] @ rows[r]; rows (R, I), w (E, O, I) in either layout -> (R, O)."""
    matrices, transposed = stored(readable(w))
    return _by_expert(rows, matrices, sizes, w.shape[1], trans_b=not transposed)


def row_gradient(dout: Tensor, w: Tensor, sizes: Tensor) -> Tensor:
    """drows[r] = w[e(r)]^T @ dout[r]; dout (R, O) -> (R, I)."""
    matrices, transposed = stored(readable(w))
    return _by_expert(dout, matrices, sizes, w.shape[2], trans_b=transposed)


def weight_gradient(dout: Tensor, rows: Tensor, w: Tensor, sizes: Tensor) -> Tensor:
    """dw[e] = dout_e^T @ rows_e in the layout of w; zero for an expert without rows."""
    transposed = is_transposed(w)
    left, right = (rows, dout) if transposed else (dout, rows)
    dw = left.new_empty(sizes.shape[0], left.shape[1], right.shape[1])
    if left.shape[0]:
        _multiply(left, right, sizes, trans_a=True, out=dw)
    # Some versions of grouped_gemm never write the matrix of an expert without rows.
    empty = (sizes == 0).nonzero().flatten()
    if empty.numel():
        dw.index_fill_(0, empty.to(dw.device), 0)
    return dw.transpose(1, 2) if transposed else dw


def _by_expert(
    rows: Tensor, matrices: Tensor, sizes: Tensor, columns: int, trans_b: bool
) -> Tensor:
    out = rows.new_empty(rows.shape[0], columns)
    if rows.shape[0]:  # it refuses a product without any row
        _multiply(rows, matrices, sizes, trans_b=trans_b, out=out)
    return out


def _multiply(a: Tensor, b: Tensor, sizes: Tensor, *, out: Tensor, **transposed: bool) -> None:
    with torch.cuda.device_of(a):  # it takes handle and stream of the current device
        find_gmm()(a, b, sizes, c=out, **transposed)
