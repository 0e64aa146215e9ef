"""The compiled module, and what every call to it needs."""

import os

import torch
from torch import Tensor

from moe_kernels import _cpu as native

# Values of the enums in csrc/cpu/kernels.hpp.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
AFFINITIES = {"softmax": 0, "sigmoid": 1, "identity": 2}
ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "swiglu": 2}


def address(tensor: Tensor | None) -> int:
    """Data pointer; 0 for ``None``."""
    return 0 if tensor is None else tensor.data_ptr()


def check_indices(name: str, indices: Tensor, end: int) -> None:
    """Raise unless these are int32 in [0, end), where a kernel may read and write.

    A plan of the routers always passes; one that somebody built or edited may not.
    """
    if indices.dtype != torch.int32:
        raise ValueError(f"{name} of the plan has dtype {indices.dtype}; expected torch.int32.")
    assert indices.is_contiguous(), name
    if not native.indices_within(indices.data_ptr(), indices.numel(), end):
        raise IndexError(
            f"{name} of the plan has values outside 0 to {end - 1}: the plan does not fit its "
            "tensors. plan.validate() names the first broken rule."
        )


def _choose_isa() -> None:
    wanted = os.environ.get("MOE_KERNELS_ISA")
    if not wanted:
        return
    usable = native.isas()
    if wanted not in usable:
        raise ValueError(
            f"MOE_KERNELS_ISA is {wanted!r}; this processor and build have {', '.join(usable)}."
        )
    native.use_isa(wanted)


_choose_isa()
