"""The activation of a dense MLP as an op; only its input is saved for backward."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels.ops.operator import Operator


def _fake(h: Tensor, activation: str) -> Tensor:
    width = h.shape[-1] // 2 if activation == "swiglu" else h.shape[-1]
    return h.new_empty(*h.shape[:-1], width)


def _save(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.activation = inputs[1]


def _backward(ctx: Any, da: Tensor) -> tuple[Tensor, None]:
    return activation_bwd[ctx.backend](da, *ctx.saved_tensors, ctx.activation), None


activation_bwd = Operator(
    "activation_bwd(Tensor da, Tensor h, str activation) -> Tensor",
    lambda da, h, activation: torch.empty_like(h, memory_format=torch.contiguous_format),
)

# GELU (tanh or exact), or silu(gate) * up where the last dimension holds the gate half first.
activation = Operator(
    "activation(Tensor h, str activation) -> Tensor",
    _fake,
    setup_context=_save,
    backward=_backward,
)
