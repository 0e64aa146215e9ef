"""How memory holds expert weights: rows or columns of each expert's matrix one after the other.

A weight (E, rows, columns) that a model keeps as (E, columns, rows) comes as a transposed view. The
kernels read it where it lies, and give its gradient the same layout.
"""

import torch
from torch import Tensor


def is_transposed(tensor: Tensor) -> bool:
    """Whether this is a transposed view of contiguous experts' matrices.

    Where both layouts are the same memory (a single row or column) it is not.
    """
    if tensor.dim() != 3 or tensor.is_contiguous():
        return False
    return tensor.transpose(1, 2).is_contiguous()


def readable(tensor: Tensor) -> Tensor:
    """The tensor itself in either layout, else a contiguous copy."""
    return tensor if is_transposed(tensor) else tensor.contiguous()


def stored(w: Tensor) -> tuple[Tensor, bool]:
    """A readable weight as memory holds it, contiguous, and whether that is (E, columns, rows)."""
    transposed = is_transposed(w)
    return w.transpose(1, 2) if transposed else w, transposed


def empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised tensor in the layout that a gradient of ``tensor`` gets."""
    if is_transposed(tensor):
        return torch.empty_like(tensor.transpose(1, 2)).transpose(1, 2)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
