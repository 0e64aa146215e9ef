"""The CUDA kernels on a simulated GPU; csrc/cuda/bindings.cpp lists its functions."""

from typing import Any

def __getattr__(name: str) -> Any: ...
