"""One op: its schema, what ``torch.compile`` and autograd have to know, and its kernels.

An op is called in two ways. Under ``torch.compile``, a dispatch mode (FLOP counter, selective
checkpointing, fake tensors) or for tensor subclasses it goes through PyTorch's dispatcher. In plain
eager code it goes straight to the kernel, under one ``autograd.Function`` with the same backward:
the dispatcher and ``register_autograd`` would cost 18 of 28 microseconds there (2.1 GHz Xeon).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor

library = torch.library.Library("moe_kernels", "DEF")

_PLAIN_TYPES = frozenset({type(None), int, float, bool, str, list})
# Where a version of PyTorch lacks these, every call goes through the dispatcher.
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_transforms: Callable[[], Any] = getattr(
    torch._C._functorch, "peek_interpreter_stack", lambda: 1
)


def _nobody_watches() -> bool:
    """True when no compiler, dispatch mode or function transform needs to see the op."""
    return not (
        torch.compiler.is_compiling() or _dispatch_modes() or _function_transforms() is not None
    )


class Operator:
    """An op of ``torch.ops.moe_kernels``.

    Args:
        schema: name, arguments and results; arguments are positional.
        fake: shapes and dtypes of the results.
        setup_context, backward: as for ``torch.library.register_autograd``; none for an op that is
            itself a backward.
        flops: FLOPs of a call from the shapes of its arguments; ``None`` counts as 0.
        autocast: positions of the arguments that are cast to the autocast dtype; ``None`` runs the
            op as it is (routing is in fp32 whatever autocast says).
    """

    def __init__(
        self,
        schema: str,
        fake: Callable[..., Any],
        *,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        flops: Callable[..., int] | None = None,
        autocast: tuple[int, ...] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        library.define(schema)
        torch.library.register_fake(f"moe_kernels::{self.name}", fake, lib=library)
        packet = getattr(torch.ops.moe_kernels, self.name)
        self.overload = packet.default
        self._kernels: dict[str, Callable[..., Any]] = {}
        self._functions: dict[str, Any] = {}
        self._setup_context, self._backward = setup_context, backward
        if backward is not None:
            torch.library.register_autograd(
                f"moe_kernels::{self.name}", backward, setup_context=setup_context, lib=library
            )
        self._has_autocast_rule = autocast is not None
        if autocast is not None:
            self._register_autocast(autocast)
        torch.utils.flop_counter.register_flop_formula(packet)(flops or (lambda *_, **__: 0))

    def implement(self, device_type: str, kernel: Callable[..., Any]) -> None:
        """Give the kernel that serves tensors of one device type."""
        assert device_type not in self._kernels, (self.name, device_type)
        library.impl(self.name, kernel, device_type.upper())
        self._kernels[device_type] = kernel
        if self._backward is not None and self._setup_context is not None:
            self._functions[device_type] = _make_function(
                self.name, kernel, self._setup_context, self._backward
            )

    def __call__(self, *args: Any) -> Any:
        """Call the op; the first argument is a tensor."""
        if not _nobody_watches():
            return self.overload(*args)
        differentiable = False
        for arg in args:
            kind = type(arg)
            if kind is Tensor or kind is torch.nn.Parameter:
                differentiable = differentiable or arg.requires_grad
            elif kind not in _PLAIN_TYPES:  # a tensor subclass knows what to do with an op
                return self.overload(*args)
        device_type = args[0].device.type
        if self._has_autocast_rule and torch.is_autocast_enabled(device_type):
            return self.overload(*args)
        if differentiable and device_type in self._functions and torch.is_grad_enabled():
            return self._functions[device_type].apply(*args)
        return self._kernels[device_type](*args)

    def _register_autocast(self, positions: tuple[int, ...]) -> None:
        for device_type in ("cpu", "cuda"):
            key = f"Autocast{device_type.upper()}"
            library.impl(self.name, self._autocast_rule(device_type, key, positions), key)

    def _autocast_rule(
        self, device_type: str, key: str, positions: tuple[int, ...]
    ) -> Callable[..., Any]:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def rule(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device_type)
            cast = [
                arg.to(dtype) if i in positions and _is_castable(arg) else arg
                for i, arg in enumerate(args)
            ]
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self.overload(*cast)

        return rule


def _make_function(
    name: str,
    kernel: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Any:
    """An ``autograd.Function`` around a kernel.

    With a ``setup_context`` of its own, ``apply`` would bind the arguments to the signature at
    every call, which costs 55 microseconds.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def _is_castable(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
