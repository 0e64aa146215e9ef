"""Elementwise activations of dense MLPs, and how one is recognised."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}

# (elementwise, gated) to the activation that ``moe_kernels.expert_mlp`` computes in its kernels.
FUSED = {("gelu_tanh", False): "gelu_tanh", ("gelu", False): "gelu", ("silu", True): "swiglu"}


def activate(h: Tensor, elementwise: str, gated: bool) -> Tensor:
    """``act(h)``, or ``act(gate) · up`` for (..., 2F) with the gate half first."""
    act = ELEMENTWISE[elementwise]
    if not gated:
        return act(h)
    gate_half, up_half = h.chunk(2, dim=-1)
    return act(gate_half) * up_half


def activation_words(elementwise: str, gated: bool) -> str:
    """Short name for a report."""
    return FUSED.get((elementwise, gated)) or (elementwise + (" gated" if gated else ""))


def recognise(act: object) -> str | None:
    """Name of the elementwise activation that ``act`` computes, or ``None``.

    It is told by its values: libraries have half a dozen classes for one GELU. The probe reaches
    past the usual clipping limits, and a learnable activation is never taken for a fixed one.
    """
    if not callable(act):
        return None
    if isinstance(act, nn.Module) and any(True for _ in act.parameters()):
        return None
    probe = torch.cat([torch.linspace(-12, 12, 193), torch.tensor([-100.0, 100.0])]).double()
    with torch.no_grad():
        try:
            values = act(probe)
        except (RuntimeError, TypeError, ValueError):  # not a function of one tensor
            return None
        if not isinstance(values, Tensor) or values.shape != probe.shape:
            return None
        for name, known in ELEMENTWISE.items():
            if torch.allclose(values.double(), known(probe), rtol=1e-6, atol=1e-6):
                return name
    return None
