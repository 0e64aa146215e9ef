"""Makes Triton's interpreter compute bf16 as a GPU does, and not look for the same thing again.

Triton 3.9's interpreter multiplies bf16 matrices as the integers that it keeps them in, and cuts
fp32 off where a GPU rounds to nearest even. Both are replaced here, for the tests only.

At every call between functions of a kernel it searches Triton's modules for functions to replace,
which the launch has replaced already: a third of the time of the routing tests.
"""

import inspect

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _widen(handle):
    """The numbers of a handle, bf16 as fp32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _round_to_bf16(data):
    rounded = torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _first_builtin(package):
    members = inspect.getmembers(package)
    return next((name for name, member in members if tl.core.is_builtin(member)), None)


def install() -> None:
    """Replace the interpreter's product and conversion, and the search that finds nothing."""
    builder = interpreter.InterpreterBuilder
    plain_cast, plain_patch = builder.cast_impl, interpreter._patch_builtin
    first = {}  # name of a function of each module that is replaced together with all others

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(_widen(a), _widen(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_round_to_bf16(src.data), dst_type.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widen(src), dst_type.scalar)
        return plain_cast(self, src, dst_type)

    def patch_builtin(package, *rest):
        if package not in first:
            first[package] = _first_builtin(package)
        name = first[package]
        if name is not None and tl.core.is_builtin(getattr(package, name)):
            plain_patch(package, *rest)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    interpreter._patch_builtin = patch_builtin
