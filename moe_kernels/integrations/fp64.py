"""Originals that cast to fp32 somewhere inside, made to compute in fp64."""

import copy
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _FloatIsDouble(TorchFunctionMode):
    """``tensor.float()`` casts to fp64, and what is asked for in fp32 is made in fp64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        wide = torch.Tensor.double if func is torch.Tensor.float else func
        named = {key: _widened(value) for key, value in (kwargs or {}).items()}
        return wide(*map(_widened, args), **named)


def _widened(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def in_fp64(original: nn.Module) -> nn.Module:
    """Copy a block so that its own forward computes in fp64, casts with ``.float()`` included."""
    exact = copy.deepcopy(original).double()
    base: Any = type(exact)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _FloatIsDouble():
            return base.forward(self, *args, **kwargs)

    exact.__class__ = type(base.__name__, (base,), {"forward": forward})
    return exact
