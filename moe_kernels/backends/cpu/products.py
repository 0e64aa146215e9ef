"""Who multiplies matrices: the BLAS inside PyTorch's CPU library, or PyTorch's own functions.

One parallel region over pieces of experts, each piece multiplied by one thread, is faster than one
parallel product after the other, above all at few rows an expert and on a busy machine. For that
C++ has to call the BLAS itself. PyTorch's x86 builds contain MKL and export its Fortran symbols,
but do not promise to: they are looked up here, tried on a small product, and where anything is
missing PyTorch multiplies (``fallback.py``) and the backends table says so.
"""

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_kernels.backends.cpu.native import native

CHOICES = ("auto", "blas", "torch")


@dataclass(frozen=True)
class Products:
    """Addresses of the BLAS functions (0 where missing), and why they are not used, if so."""

    f32: int = 0
    f64: int = 0
    bf16: int = 0
    set_threads: int = 0
    reason: str = ""

    def serve(self, dtype: torch.dtype) -> bool:
        """Whether C++ can multiply for tokens of this dtype."""
        return bool(self.f64 if dtype == torch.float64 else self.f32)


def _find() -> Products:
    choice = os.environ.get("MOE_KERNELS_PRODUCTS") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"MOE_KERNELS_PRODUCTS is {choice!r}; expected {', '.join(CHOICES)}.")
    if choice == "torch":
        return Products(reason="MOE_KERNELS_PRODUCTS is 'torch'")
    found = _look_up()
    if found.reason and choice == "blas":
        raise RuntimeError(f"MOE_KERNELS_PRODUCTS is 'blas', but {found.reason}.")
    return found


def _look_up() -> Products:
    if not sys.platform.startswith("linux") or not torch.backends.mkl.is_available():
        return Products(reason="this PyTorch build has no MKL")
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Loaded already: this finds the library in memory.
        library = ctypes.CDLL(str(path))
        f32, f64 = _symbol(library, "sgemm_"), _symbol(library, "dgemm_")
        set_threads = _symbol(library, "MKL_Set_Num_Threads_Local")
    except (OSError, AttributeError) as error:
        return Products(reason=f"PyTorch's library does not give its BLAS away ({error})")
    if not (_multiplies(f32, ctypes.c_float) and _multiplies(f64, ctypes.c_double)):
        return Products(reason="the BLAS in PyTorch's library failed its trial product")
    return Products(f32, f64, _find_bf16(library), set_threads)


def _symbol(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def _find_bf16(library: ctypes.CDLL) -> int:
    """Products of bf16 operands: by MKL where the processor has tiles for them (AMX), by C++ here
    where it multiplies pairs of them (AVX512-BF16).

    Elsewhere converting to fp32 is faster, and without tiles MKL does nothing else.
    """
    if not getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        return int(native.gemm_bf16())
    try:
        return _symbol(library, "gemm_bf16bf16f32_")
    except AttributeError:
        return 0


def _multiplies(function: int, scalar: Any) -> bool:
    """Try c = a^T b, column-major, with a (2, 3), b (2, 2) and 32-bit integers."""
    a, b, c = (scalar * 6)(1, 2, 3, 4, 5, 6), (scalar * 4)(1, 2, 3, 4), (scalar * 6)()
    m, n, k = ctypes.c_int(3), ctypes.c_int(2), ctypes.c_int(2)
    one, zero = scalar(1.0), scalar(0.0)
    transpose, plain = ctypes.c_char(b"T"), ctypes.c_char(b"N")
    arguments = (transpose, plain, m, n, k, one, a, k, b, k, zero, c, m)
    ctypes.CFUNCTYPE(None, *(ctypes.c_void_p,) * 13)(function)(*map(ctypes.addressof, arguments))
    return list(c) == [5.0, 11.0, 17.0, 11.0, 25.0, 39.0]


PRODUCTS = _find()
native.set_blas(PRODUCTS.f32, PRODUCTS.f64, PRODUCTS.bf16, PRODUCTS.set_threads)


def describe() -> str:
    """One line for the backends table."""
    parts = [f"instruction set {native.isa()}"]
    if PRODUCTS.reason:
        parts.append(f"products by torch functions, because {PRODUCTS.reason}")
    else:
        parts.append("products by the MKL inside PyTorch, one thread an expert piece")
        parts.append("bf16 " + ("multiplied as it is" if PRODUCTS.bf16 else "multiplied in fp32"))
    return "; ".join(parts)
