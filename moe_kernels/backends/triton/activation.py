"""Activation of a dense MLP, such as the shared expert; only its input is saved for backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton.activation_math import (
    ACTIVATIONS,
    SWIGLU,
    gelu,
    gelu_with_slope,
    swiglu,
    swiglu_with_slopes,
)
from moe_kernels.backends.triton.launch import DEVICE_TYPES, launch
from moe_kernels.ops import activation as ops

BLOCK = 1024


@triton.jit(do_not_specialize=["size"])
def _activation_fwd_kernel(
    h_ptr, a_ptr, size, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """a = act(h); WIDTH is that of a row of a, whose gate half comes first in h for SwiGLU."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = i < size
    if ACTIVATION == SWIGLU:
        place = i // WIDTH * (2 * WIDTH) + i % WIDTH
        gate = tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + place + WIDTH, mask=mask, other=0.0).to(tl.float32)
        a = swiglu(gate, up)
    else:
        a = gelu(tl.load(h_ptr + i, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(a_ptr + i, a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"])
def _activation_bwd_kernel(
    da_ptr, h_ptr, dh_ptr, size, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """dh = da * act'(h)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = i < size
    da = tl.load(da_ptr + i, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == SWIGLU:
        place = i // WIDTH * (2 * WIDTH) + i % WIDTH
        gate = tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + place + WIDTH, mask=mask, other=0.0).to(tl.float32)
        _, by_gate, by_up = swiglu_with_slopes(gate, up)
        tl.store(dh_ptr + place, (da * by_gate).to(dh_ptr.dtype.element_ty), mask=mask)
        tl.store(dh_ptr + place + WIDTH, (da * by_up).to(dh_ptr.dtype.element_ty), mask=mask)
    else:
        h = tl.load(h_ptr + i, mask=mask, other=0.0).to(tl.float32)
        _, slope = gelu_with_slope(h, ACTIVATION)
        tl.store(dh_ptr + i, (da * slope).to(dh_ptr.dtype.element_ty), mask=mask)


def _activation(h: Tensor, activation: str) -> Tensor:
    width = h.shape[-1] // 2 if activation == "swiglu" else h.shape[-1]
    a = h.new_empty(*h.shape[:-1], width)
    launch(
        _activation_fwd_kernel,
        (triton.cdiv(a.numel(), BLOCK),),
        h.contiguous(),
        a,
        a.numel(),
        WIDTH=width,
        ACTIVATION=ACTIVATIONS[activation],
        BLOCK=BLOCK,
    )
    return a


def _activation_bwd(da: Tensor, h: Tensor, activation: str) -> Tensor:
    h = h.contiguous()
    dh = torch.empty_like(h)
    launch(
        _activation_bwd_kernel,
        (triton.cdiv(da.numel(), BLOCK),),
        da.contiguous(),
        h,
        dh,
        da.numel(),
        WIDTH=da.shape[-1],
        ACTIVATION=ACTIVATIONS[activation],
        BLOCK=BLOCK,
    )
    return dh


ops.activation.implement("triton", _activation, DEVICE_TYPES)
ops.activation_bwd.implement("triton", _activation_bwd, DEVICE_TYPES)
