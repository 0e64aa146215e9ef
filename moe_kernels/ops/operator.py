"""One op: its schema, what ``torch.compile`` and autograd have to know, and its kernels.

An op is called in two ways. Under ``torch.compile``, a dispatch mode (FLOP counter, selective
checkpointing, fake tensors) or for tensor subclasses it goes through PyTorch's dispatcher. In plain
eager code it goes straight to the kernel, under one ``autograd.Function`` with the same backward:
the dispatcher and ``register_autograd`` would cost 18 of 28 microseconds there (2.1 GHz Xeon).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor
from torch.autograd import forward_ad

library = torch.library.Library("moe_kernels", "DEF")

_PLAIN_TYPES = frozenset({type(None), int, float, bool, str, list})
# Where a version of PyTorch lacks these, every call goes through the dispatcher.
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_transforms: Callable[[], Any] = getattr(
    torch._C._functorch, "peek_interpreter_stack", lambda: 1
)


def _nobody_watches() -> bool:
    """True when no compiler, tracer, dispatch mode or function transform needs to see the op."""
    return not (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_transforms() is not None
        or torch._C._get_tracing_state() is not None
    )


class Operator:
    """An op of ``torch.ops.moe_kernels``, with one overload for each backend that has a kernel.

    Args:
        schema: name, arguments and results; arguments are positional.
        fake: shapes and dtypes of the results.
        setup_context, backward: as for ``torch.library.register_autograd``; none for an op that is
            itself a backward. ``ctx.backend`` names the backend whose kernel ran forward.
        flops: FLOPs of a call from the shapes of its arguments; ``None`` counts as 0.
        autocast: positions of the arguments that are cast to the autocast dtype; ``None`` runs the
            op as it is (routing is in fp32 whatever autocast says).
        twice_differentiable: whether ``backward`` is made of PyTorch's operations, so that it has
            a backward itself; otherwise differentiating twice is an error.
        lists: positions of the arguments that are lists of tensors. ``ctx.needs_input_grad`` and
            what ``backward`` returns have lists there, too.
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
        twice_differentiable: bool = False,
        lists: tuple[int, ...] = (),
    ) -> None:
        self.name, _, self.signature = schema.partition("(")
        self.fake, self.setup_context, self.backward = fake, setup_context, backward
        self.twice_differentiable, self.lists = twice_differentiable, lists
        self.flops, self.autocast = flops or (lambda *_, **__: 0), autocast
        self.variants: dict[str, Variant] = {}

    def implement(
        self,
        backend: str,
        kernel: Callable[..., Any],
        device_types: tuple[str, ...],
        inference: Callable[..., Any] | None = None,
    ) -> "Variant":
        """Give a backend's kernel; defines the overload ``<op>.<backend>`` and returns it.

        ``inference`` is called instead in plain eager code that will not be differentiated; what
        only the backward reads it may leave out.
        """
        assert backend not in self.variants, (self.name, backend)
        self.variants[backend] = Variant(self, backend, kernel, device_types, inference or kernel)
        return self.variants[backend]

    def __getitem__(self, backend: str) -> "Variant":
        return self.variants[backend]

    def owns(self, overload: Any) -> bool:
        """Whether this is one of the op's overloads."""
        return any(variant.overload is overload for variant in self.variants.values())


class Variant:
    """An op as one backend runs it."""

    def __init__(
        self,
        operator: Operator,
        backend: str,
        kernel: Callable[..., Any],
        device_types: tuple[str, ...],
        inference: Callable[..., Any],
    ) -> None:
        name = f"{operator.name}.{backend}"
        library.define(f"{name}({operator.signature}")
        torch.library.register_fake(f"moe_kernels::{name}", operator.fake, lib=library)
        for device_type in device_types:
            library.impl(name, kernel, device_type.upper())
        packet = getattr(torch.ops.moe_kernels, operator.name)
        self.overload = getattr(packet, backend)
        self.kernel, self._inference = kernel, inference
        self._function = None
        if operator.backward is not None and operator.setup_context is not None:
            setup_context = _remember_backend(operator.setup_context, backend)
            torch.library.register_autograd(
                f"moe_kernels::{name}", operator.backward, setup_context=setup_context, lib=library
            )
            self._function = _make_function(name, kernel, setup_context, operator)
        self._lists = operator.lists
        self._has_autocast_rule = operator.autocast is not None
        if operator.autocast is not None:
            for device_type in ("cpu", "cuda"):
                rule = _autocast_rule(self.overload, device_type, operator.autocast)
                library.impl(name, rule, f"Autocast{device_type.upper()}")
        # FLOPs are those of the op, whoever runs it. Before PyTorch 2.13 a packet has another hash
        # after each new overload.
        if packet not in torch.utils.flop_counter.flop_registry:
            torch.utils.flop_counter.register_flop_formula(packet)(operator.flops)

    def __call__(self, *args: Any) -> Any:
        """Call the op; the first argument is a tensor.

        Raises:
            RuntimeError: inside forward-mode differentiation, where tangents would be lost, and
                under ``torch.func.grad`` and ``vmap``.
        """
        if not _nobody_watches():
            return self._watched(*args)
        if forward_ad._current_level >= 0:
            raise RuntimeError(_no_transform(self.overload, "forward-mode differentiation"))
        differentiable = False
        leaves = _flatten(args, self._lists) if self._lists else args
        for arg in leaves:
            kind = type(arg)
            if kind is Tensor or kind is torch.nn.Parameter:
                differentiable = differentiable or arg.requires_grad
            elif kind not in _PLAIN_TYPES:  # a tensor subclass knows what to do with an op
                return self.overload(*args)
        if self._has_autocast_rule and torch.is_autocast_enabled(args[0].device.type):
            return self.overload(*args)
        if differentiable and self._function is not None and torch.is_grad_enabled():
            if self._lists:
                return self._function.apply(tuple(len(args[i]) for i in self._lists), *leaves)
            return self._function.apply(*args)
        return self._inference(*args)

    def _watched(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _function_transforms() is None:
            return self.overload(*args)
        if forward_ad._current_level >= 0:
            raise RuntimeError(_no_transform(self.overload, "forward-mode differentiation"))
        try:
            return self.overload(*args)
        except RuntimeError as error:
            raise RuntimeError(_no_transform(self.overload, "this transform")) from error


def _no_transform(overload: Any, transform: str) -> str:
    return (
        f"moe_kernels: {overload} has no rule for {transform} of torch.func; use torch.autograd "
        "(backward, torch.autograd.grad), or revert() a swapped model for it."
    )


def _flatten(args: Sequence[Any], lists: tuple[int, ...]) -> list[Any]:
    """The arguments, with the elements of the lists at these positions in place of the lists."""
    leaves: list[Any] = []
    for i, arg in enumerate(args):
        if i in lists:
            leaves.extend(arg)
        else:
            leaves.append(arg)
    return leaves


def _unflatten(
    leaves: Sequence[Any], lists: tuple[int, ...], lengths: tuple[int, ...]
) -> list[Any]:
    """The arguments again, from the leaves and the lengths of the lists."""
    args: list[Any] = []
    at, length_of = 0, dict(zip(lists, lengths, strict=True))
    while at < len(leaves) or len(args) in length_of:
        length = length_of.get(len(args))
        if length is None:
            args.append(leaves[at])
            at += 1
        else:
            args.append(list(leaves[at : at + length]))
            at += length
    return args


def _remember_backend(setup_context: Callable[..., None], backend: str) -> Callable[..., None]:
    """The backward calls ops too, and those of the same backend."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = backend
        setup_context(ctx, inputs, output)

    return setup


def _autocast_rule(
    overload: Any, device_type: str, positions: tuple[int, ...]
) -> Callable[..., Any]:
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")
    keys = torch._C.DispatchKeySet(key)

    def rule(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        # A list of tensors stays: its op casts the whole of it in one go.
        cast = [
            arg.to(dtype) if i in positions and _is_castable(arg) else arg
            for i, arg in enumerate(args)
        ]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*cast)

    return rule


def _make_function(
    name: str,
    kernel: Callable[..., Any],
    setup_context: Callable[..., None],
    operator: Operator,
) -> Any:
    """An ``autograd.Function`` around a kernel.

    With a ``setup_context`` of its own, ``apply`` would bind the arguments to the signature at
    every call, which costs 55 microseconds. For an op with lists, ``apply`` takes their lengths and
    then the leaves, because autograd sees no tensors inside a list.
    """
    lists, backward = operator.lists, operator.backward
    assert backward is not None

    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        setup_context(ctx, args, output)
        return output

    def forward_leaves(ctx: Any, lengths: tuple[int, ...], *leaves: Any) -> Any:
        ctx.lengths = lengths
        return forward(ctx, *_unflatten(leaves, lists, lengths))

    def backward_leaves(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = _unflatten(needs[1:], lists, ctx.lengths)
        try:
            return (None, *_flatten(backward(ctx, *gradients), lists))
        finally:
            ctx.needs_input_grad = needs  # a graph that is retained comes by again

    run, run_back = (forward_leaves, backward_leaves) if lists else (forward, backward)
    if not operator.twice_differentiable:
        run_back = _only_once(run_back, name)
    members = {"forward": staticmethod(run), "backward": staticmethod(run_back)}
    return type(name.replace(".", "_"), (torch.autograd.Function,), members)


def _only_once(backward: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Let gradients of gradients fail: kernels have none, and would count as constants.

    ``once_differentiable`` of PyTorch does so only where the upstream gradient needs one itself.
    """
    message = f"moe_kernels: {name} can be differentiated once; use backend='reference' for more"

    def once(ctx: Any, *gradients: Any) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return outputs
        single = isinstance(outputs, Tensor)
        listed = (outputs,) if single else outputs
        leaves = [None if t is None else t.detach().requires_grad_() for t in listed]
        fail = torch._C._functions.DelayedError(message.encode(), len(leaves))
        failing = fail(*leaves)  # type: ignore[arg-type]  # None passes through
        return failing[0] if single and not isinstance(failing, Tensor) else failing

    return once


def _is_castable(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
