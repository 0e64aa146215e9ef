"""Activation of a dense MLP on the CPU."""

import torch
from torch import Tensor

from moe_kernels.backends.cpu.memory import empty
from moe_kernels.backends.cpu.native import ACTIVATIONS, DTYPES, native
from moe_kernels.ops import activation as ops


def _kernel(h: Tensor, activation: str) -> Tensor:
    h = h.contiguous()
    width = h.shape[-1] // 2 if activation == "swiglu" else h.shape[-1]
    a = empty((*h.shape[:-1], width), h.dtype)
    native.activation_fwd(
        DTYPES[h.dtype],
        ACTIVATIONS[activation],
        h.data_ptr(),
        *(0, 0, 0),  # bias, weights, expert_offsets
        a.data_ptr(),
        a.numel() // max(width, 1),
        1,
        width,
        torch.get_num_threads(),
    )
    return a


def _bwd_kernel(da: Tensor, h: Tensor, activation: str) -> Tensor:
    da, h = da.contiguous(), h.contiguous()
    dh = empty(h.shape, h.dtype)
    native.activation_bwd(
        DTYPES[h.dtype],
        ACTIVATIONS[activation],
        h.data_ptr(),
        *(0, 0, 0, 0),  # bias, weights, expert_offsets, a
        da.data_ptr(),
        dh.data_ptr(),
        0,  # dweights
        da.numel() // max(da.shape[-1], 1),
        1,
        da.shape[-1],
        torch.get_num_threads(),
    )
    return dh


ops.activation.implement("cpu", _kernel, ("cpu",))
ops.activation_bwd.implement("cpu", _bwd_kernel, ("cpu",))
