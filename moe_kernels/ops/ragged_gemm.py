"""The reference's product over ragged rows as an op: ``torch.compile`` need not see its loop."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels.backends.reference.ragged_gemm import ragged_gemm_bwd, ragged_gemm_fwd
from moe_kernels.ops.operator import library

library.define("ragged_gemm(Tensor rows, Tensor w, Tensor expert_offsets) -> Tensor")
library.define(
    "ragged_gemm_bwd(Tensor dout, Tensor rows, Tensor w, Tensor expert_offsets) -> (Tensor, Tensor)"
)
library.impl("ragged_gemm", ragged_gemm_fwd, "CompositeExplicitAutograd")
library.impl("ragged_gemm_bwd", ragged_gemm_bwd, "CompositeExplicitAutograd")


@torch.library.register_fake("moe_kernels::ragged_gemm", lib=library)
def _ragged_gemm_fake(rows: Tensor, w: Tensor, expert_offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], w.shape[1])


@torch.library.register_fake("moe_kernels::ragged_gemm_bwd", lib=library)
def _ragged_gemm_bwd_fake(
    dout: Tensor, rows: Tensor, w: Tensor, expert_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(w)


def _save_operands(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _ragged_gemm_backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
    drows, dw = torch.ops.moe_kernels.ragged_gemm_bwd(dout, *ctx.saved_tensors)
    return drows, dw, None


torch.library.register_autograd(
    "moe_kernels::ragged_gemm", _ragged_gemm_backward, setup_context=_save_operands, lib=library
)


def ragged_gemm(rows: Tensor, w: Tensor, expert_offsets: Tensor) -> Tensor:
    """``out[r] = w[e(r)] @ rows[r]`` as one op; see ``moe_kernels.grouped_gemm``."""
    return torch.ops.moe_kernels.ragged_gemm(rows, w, expert_offsets)
