"""Expert MLP whose weights are one tensor for each expert: read in place where they are adjacent.

Models keep an ``nn.Linear`` for each expert. Where these parameters lie one after the other in
memory (``integrations/packing.py`` puts them there), the kernels read them as one stacked tensor;
wherever they do not, they are stacked, which is a copy but the same numbers. The question is asked
inside the op, at every call: a compiled graph that took adjacency for granted would read freed
memory after a parameter has moved.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels.ops.experts import empty_gradient
from moe_kernels.ops.operator import Operator

Optional = Tensor | None


def are_adjacent(parts: list[Tensor]) -> bool:
    """Whether the parts, of one shape and dtype, lie one after the other in one storage."""
    first = parts[0]
    start, step = first.data_ptr(), first.numel() * first.element_size()
    for i, part in enumerate(parts):
        if part.data_ptr() != start + i * step or not part.is_contiguous():
            return False
    storage = first.untyped_storage()
    return start + len(parts) * step <= storage.data_ptr() + storage.nbytes()


def stack(parts: list[Tensor], num_experts: int, dtype: torch.dtype) -> Optional:
    """(E, rows, ...) of the parts, each expert's one below the other; no copy where adjacent."""
    if not parts:
        return None
    rest = parts[0].shape[1:]
    shape = (num_experts, len(parts) // num_experts * parts[0].shape[0], *rest)
    if are_adjacent(parts):
        row = math.prod(rest)
        strides = (shape[1] * row, row, *((1,) if rest else ()))
        whole = parts[0].detach().as_strided(shape, strides)
    else:
        whole = torch.cat(parts).view(shape)
    return whole.to(dtype)


def _stacked_like(parts: list[Tensor], num_experts: int, x: Tensor, wanted: bool) -> Tensor:
    if not parts or not wanted:
        return x.new_empty(0)
    rows = len(parts) // num_experts * parts[0].shape[0]
    return x.new_empty(num_experts, rows, *parts[0].shape[1:])


def _fake(
    x: Tensor,
    routing_weights: Tensor,
    w_in: list[Tensor],
    w_out: list[Tensor],
    bias_in: list[Tensor],
    bias_out: list[Tensor],
    shared: Optional,
    residual: Optional,
    token_indices: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    columns = len(w_in) // len(w_out) * w_in[0].shape[0]
    return out, x.new_empty(token_indices.shape[0], columns)


def _bwd_fake(
    dout: Tensor,
    h: Tensor,
    wanted: list[bool],
    x: Tensor,
    routing_weights: Tensor,
    *inputs: Any,
) -> tuple[Tensor, ...]:
    lists, num_experts = inputs[:4], len(inputs[1])
    return (
        empty_gradient(x, x, wanted[0]),
        empty_gradient(x, routing_weights, wanted[1]),
        *(
            _stacked_like(parts, num_experts, x, want)
            for parts, want in zip(lists, wanted[2:], strict=True)
        ),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, routing_weights, *lists = inputs[:6]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.counts = [len(parts) for parts in lists]
    parts = [part for parts in lists for part in parts]
    ctx.save_for_backward(output[1], x, routing_weights, *inputs[8:12], *parts)
    ctx.settings = inputs[12:]


def _backward(ctx: Any, dout: Optional, _: None) -> tuple[Any, ...]:
    need = ctx.needs_input_grad
    if dout is None:
        return tuple([None] * len(n) if isinstance(n, list) else None for n in need)
    h, x, routing_weights, *saved = ctx.saved_tensors
    indices, parts = saved[:4], saved[4:]
    lists, at = [], 0
    for count in ctx.counts:
        lists.append(parts[at : at + count])
        at += count
    wanted = [any(n) if isinstance(n, list) else bool(n) for n in need[:6]]
    gradients = expert_mlp_parts_bwd[ctx.backend](
        dout, h, wanted, x, routing_weights, *lists, *indices, *ctx.settings
    )
    split = [
        _split(gradient, parts, needs)
        for gradient, parts, needs in zip(gradients[2:], lists, need[2:6], strict=True)
    ]
    plain = [g if want else None for g, want in zip(gradients[:2], wanted[:2], strict=True)]
    dterms = (dout if n else None for n in need[6:8])
    return (*plain, *split, *dterms, *(None,) * 6)


def _split(gradient: Tensor, parts: list[Tensor], needs: list[bool]) -> list[Optional]:
    """Each part's share of the stacked gradient, in the part's dtype."""
    if not any(needs):
        return [None] * len(parts)
    shares = gradient.to(parts[0].dtype).view(len(parts), *parts[0].shape).unbind(0)
    return [share if need else None for share, need in zip(shares, needs, strict=True)]


def _flops(x: Any, weights: Any, w_in: Any, w_out: Any, *args: Any, **_: Any) -> int:
    rows = args[4][0]  # token_indices
    each = len(w_in) // len(w_out) * w_in[0][0] * w_in[0][1] + w_out[0][0] * w_out[0][1]
    return 2 * rows * each


def _bwd_flops(dout: Any, h: Any, wanted: list[bool], *inputs: Any, **_: Any) -> int:
    w_in, w_out = inputs[2], inputs[3]
    rows, out = h[0], w_out[0][0] * w_out[0][1]
    into = len(w_in) // len(w_out) * w_in[0][0] * w_in[0][1]
    return 2 * rows * (out + wanted[0] * into + wanted[2] * into + wanted[3] * out)


_TENSORS = (
    "Tensor x, Tensor routing_weights, Tensor[] w_in, Tensor[] w_out, Tensor[] bias_in, "
    "Tensor[] bias_out"
)
_INDICES = (
    "Tensor token_indices, Tensor row_indices, Tensor row_offsets, Tensor expert_offsets, "
    "SymInt rows_per_expert, str activation"
)

# Gradients of x and the routing weights, and stacked those of the lists; empty where not wanted.
expert_mlp_parts_bwd = Operator(
    f"expert_mlp_parts_bwd(Tensor dout, Tensor h, bool[] wanted, {_TENSORS}, {_INDICES}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    flops=_bwd_flops,
    lists=(5, 6, 7, 8),
)

# As `expert_mlp`. w_out and the biases are lists of E tensors; w_in of E, or for SwiGLU of E (gate
# above up) or 2E (gate, up, gate, up, ...). Weights are cast to the dtype of x.
expert_mlp_parts = Operator(
    f"expert_mlp_parts({_TENSORS}, Tensor? shared, Tensor? residual, {_INDICES}) "
    "-> (Tensor, Tensor)",
    _fake,
    setup_context=_save,
    backward=_backward,
    flops=_flops,
    autocast=(0,),
    lists=(2, 3, 4, 5),
)


def implement(
    backend: str,
    kernel: Callable[..., tuple[Tensor, Tensor]],
    bwd_kernel: Callable[..., tuple[Tensor, ...]],
    device_types: tuple[str, ...],
    inference: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Serve both ops with the kernels of ``expert_mlp``, which take stacked weights."""

    def forward(x: Tensor, routing_weights: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        return kernel(x, routing_weights, *_stack_all(x, inputs[:4]), *inputs[4:])

    def infer(x: Tensor, routing_weights: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        return (inference or kernel)(x, routing_weights, *_stack_all(x, inputs[:4]), *inputs[4:])

    def backward(
        dout: Tensor, h: Tensor, wanted: list[bool], x: Tensor, weights: Tensor, *inputs: Any
    ) -> tuple[Tensor, ...]:
        stacked = _stack_all(x, inputs[:4])
        return bwd_kernel(dout, h, wanted, x, weights, *stacked, *inputs[4:])

    expert_mlp_parts.implement(backend, forward, device_types, inference=infer)
    expert_mlp_parts_bwd.implement(backend, backward, device_types)


def _stack_all(x: Tensor, lists: tuple[list[Tensor], ...]) -> list[Optional]:
    num_experts = len(lists[1])
    return [stack(parts, num_experts, x.dtype) for parts in lists]
