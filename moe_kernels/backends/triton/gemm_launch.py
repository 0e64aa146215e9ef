"""Starts the products whose result has a row for each routed token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.backends.triton.config_table import Config
from moe_kernels.backends.triton.configs import choose, precision
from moe_kernels.backends.triton.gemm_tiles import max_row_tiles
from moe_kernels.backends.triton.launch import block_size, launch, target_of
from moe_kernels.ops.layout import readable


@dataclass(frozen=True)
class GemmShape:
    """Sizes of one product; all known on the host.

    Attributes:
        product: row of the config table.
        rows: R.
        experts: E.
        rows_per_expert: for equal groups, 0 for ragged ones.
        in_features, out_features: columns of the operand and of the result (of a half for SwiGLU).
    """

    product: str
    rows: int
    experts: int
    rows_per_expert: int
    in_features: int
    out_features: int

    def config(self, a: Tensor, w: Tensor) -> Config:
        """Tile sizes for these operands."""
        return choose(
            self.product,
            target_of(a),
            a.dtype,
            self.in_features,
            self.out_features,
            self.rows // self.experts,
            aligned=describable(a)
            and describable(w)
            and self.out_features * a.element_size() % 16 == 0,
        )


def launch_gemm(
    kernel: Any,
    shape: GemmShape,
    arguments: Callable[[Any, Any], tuple[Any, ...]],
    a: Tensor,
    w: Tensor,
    *,
    transposed: bool,
    rows_in_order: bool = False,
    **constants: Any,
) -> None:
    """Start a product: plain grid, or persistent with tensor descriptors where the device has them.

    Args:
        kernel: one that walks tiles with ``gemm_tiles``.
        shape: its sizes.
        arguments: from the sources of w and a, each a tensor or a descriptor, to the arguments.
        a: the operand with a row for each token, or for each row if ``rows_in_order``.
        w: (E, ·, ·) contiguous; ``transposed`` when its rows are the product's columns, as
            those of ``nn.Linear`` are.
        constants: further constants of the kernel.
    """
    if shape.rows == 0:
        return
    config, target = shape.config(a, w), target_of(a)
    block_n, block_k = config.block_n, config.block_k
    w_block = [block_n, block_k] if transposed else [block_k, block_n]
    # Along the summed dimension a tile that is not whole would run into the next expert's matrix.
    whole = transposed or shape.in_features % block_k == 0
    wanted = config.persistent and target.descriptors
    w_descriptor = wanted and whole and describable(w)
    w_source = _describe(w.flatten(0, 1), w_block) if w_descriptor else w
    a_source: Any = a
    if rows_in_order:
        # Where a's own columns end inside a tile, the descriptor fills with zeros, w with whatever
        # follows: not a number times zero is not zero.
        constants["A_DESCRIPTOR"] = wanted and whole and describable(a)
        if constants["A_DESCRIPTOR"]:
            a_source = _describe(a, [config.block_m, block_k])
    tiles = max_row_tiles(shape.rows, shape.experts, shape.rows_per_expert, config.block_m)
    tiles *= triton.cdiv(shape.out_features, block_n)
    launch(
        kernel,
        (min(tiles, target.processors * config.blocks) if config.persistent else tiles,),
        *arguments(w_source, a_source),
        EXPERTS=shape.experts,
        EQUAL=shape.rows_per_expert > 0,
        W_DESCRIPTOR=w_descriptor,
        PRECISION=precision(a, target.arch),
        GROUP_M=config.group_m,
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_E=block_size(shape.experts),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        blocks=config.blocks,
        **constants,
    )


def describable(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can describe it: rows and base in steps of 16 bytes."""
    return tensor.shape[-1] * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0


def _describe(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    # Not matrix.stride(): that of a single row may be anything.
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], block)


def readable_or_none(tensor: Tensor | None) -> Any:
    """The tensor in a layout that the products read, copied where need be, or ``None``."""
    return None if tensor is None else readable(tensor)


def empty_or_none(tensor: Tensor | None, like: Tensor) -> Tensor:
    """What an op returns for a gradient: the tensor, or an empty one where none is wanted."""
    return torch.empty(0, dtype=like.dtype, device=like.device) if tensor is None else tensor
