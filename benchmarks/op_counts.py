"""How many operators one call dispatches, and how many of them would make a GPU's host wait.

Counted on the CPU, in PyTorch's dispatcher. An operator stands for about one kernel launch: views,
uninitialised memory and the reading of a number launch nothing and are left out. An operator of a
library counts once, whatever it launches, and kernels that bypass the dispatcher (Triton's) do not
count. What the call does on a GPU may differ: ``benchmarks.gpu.probes`` measures it there.

Not for code under ``torch.compile``, which PyTorch runs uncompiled while operators are watched.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# No kernel: memory without values, another shape, a number that the host reads, a dtype.
_NO_KERNEL = frozenset(
    {
        *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty"),
        *("new_empty_strided", "_unsafe_view", "_reshape_alias", "_local_scalar_dense"),
        *("promote_types", "result_type", "can_cast"),
    }
)
# The size of their result, or a loop in them, depends on values.
_READS = frozenset(
    {
        *("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
    }
)
# These read a CPU tensor's memory without an operator; on a GPU they copy it and wait.
_PYTHON_READS = frozenset({"tolist", "numpy", "cpu", "__array__"})
# On a CPU ``one_hot`` checks its argument with these; on a GPU it does not.
_ONE_HOT_CHECK = frozenset({"aminmax", "_local_scalar_dense"})

# A plain global: ``torch.compile`` guards on it, and breaks its graph at a ``ContextVar``.
_counting = False


def counting() -> bool:
    """Whether operators are being counted: a plain provider then takes its way for a GPU."""
    return _counting


def count(call: Callable[[], object]) -> dict[str, int]:
    """``ops`` and ``device_reads`` of one call, made here with gradients as they are set outside.

    ``Tensor.to(device)`` does not count as a read: on a CPU, a copy to the host and a move to the
    tensor's own device look alike.
    """
    operators = _Operators()
    functions = _Functions(operators)
    global _counting
    _counting = True
    try:
        with operators, functions:
            call()
    finally:
        _counting = False
    return {"ops": operators.ops, "device_reads": operators.reads + functions.reads}


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = self.reads = 0
        self.ignored: frozenset[str] = frozenset()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name not in self.ignored:
            self.ops += not func.is_view and name not in _NO_KERNEL
            self.reads += _reads(name, args, kwargs)
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    def __init__(self, operators: _Operators) -> None:
        super().__init__()
        self.reads = 0
        self._operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        self.reads += name in _PYTHON_READS
        if name != "one_hot" or _classes(args, kwargs) < 0:
            return func(*args, **kwargs)
        self._operators.ignored = _ONE_HOT_CHECK
        try:
            return func(*args, **kwargs)
        finally:
            self._operators.ignored = frozenset()


def _classes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """``num_classes`` of ``one_hot``; -1 makes it read the largest class."""
    return int(args[1] if len(args) > 1 else kwargs.get("num_classes", -1))


def _reads(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "index":
        return _has_mask(args[1])
    if name in ("index_put", "index_put_"):
        # One number behind one mask is ``masked_fill``.
        return _has_mask(args[1]) and args[2].dim() > 0
    return name in _READS


def _has_mask(indices: list[Tensor | None]) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
