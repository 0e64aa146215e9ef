"""Layers for Hugging Face ``kernels``, found without the hub.

A model marks a layer class with ``kernels.use_kernel_forward_from_hub(name)``;
``kernels.kernelize(model, mode=..., device=...)`` then gives its instances the forward that is
registered under this name, here one of this package:

- ``"MoEKernelsExperts"``: SwiGLU experts with ``gate_up_proj`` (E, 2F, D), the gate first, and
  ``down_proj`` (E, D, F); ``forward(hidden_states, top_k_index, top_k_weights)`` of (T, D), (T, K),
  (T, K), as in transformers.
- ``"MegaBlocksMoeMLP"``: what transformers calls GPT-OSS' block, with its ``router`` and
  ``experts``; ``forward(hidden_states)`` of (B, S, D).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_kernels.choices import plan_from_choices
from moe_kernels.expert_mlp import expert_mlp
from moe_kernels.integrations.transformers_experts import experts_forward

DEVICES = ("cpu", "cuda")


class _Experts(nn.Module):
    """SwiGLU experts for choices that a router has made."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Any:
        plan = plan_from_choices(top_k_index, top_k_weights, self.down_proj.shape[0])
        return expert_mlp(
            hidden_states, plan, self.gate_up_proj, self.down_proj, activation="swiglu"
        )


class _GptOssBlock(nn.Module):
    """Router and experts of GPT-OSS; returns the weights of the choices, too, as the original."""

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, hidden_states: Tensor) -> Any:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.router(tokens)
        out = experts_forward(self.experts, tokens, top_k_index, top_k_weights)
        return out.view(hidden_states.shape), top_k_weights


LAYERS: dict[str, type[nn.Module]] = {
    "MoEKernelsExperts": _Experts,
    "MegaBlocksMoeMLP": _GptOssBlock,
}


@dataclass(frozen=True)
class _OwnLayer:
    """Where ``kernels`` finds a layer: not on the hub but here."""

    name: str

    def load(self) -> type[nn.Module]:
        return LAYERS[self.name]

    def __str__(self) -> str:
        return f"moe_kernels (layer {self.name})"


def kernel_mapping(
    names: Sequence[str] = tuple(LAYERS), devices: Sequence[str] = DEVICES
) -> dict[str, Any]:
    """Make a mapping for ``kernels.use_kernel_mapping``, which holds inside a ``with``.

    Args:
        names: layer names, as above.
        devices: device types that these layers serve.

    Returns:
        Layer name to device type to the layer, for every mode: inference, training, compiled.

    Raises:
        ValueError: for an unknown name.
    """
    unknown = [name for name in names if name not in LAYERS]
    if unknown:
        raise ValueError(f"no layer is called {unknown[0]!r}; expected one of {', '.join(LAYERS)}.")
    return {name: {device: _OwnLayer(name) for device in devices} for name in names}


def register_with_kernels(
    names: Sequence[str] = tuple(LAYERS), devices: Sequence[str] = DEVICES
) -> None:
    """Register layers of this package with Hugging Face ``kernels``, until the process ends.

    Nothing is downloaded. A later registration of the same name and device takes its place:
    ``from_pretrained(..., use_kernels=True)`` of transformers registers ``"MegaBlocksMoeMLP"``, so
    register after it and call ``kernels.kernelize`` yourself.

    Args:
        names: layer names, as above.
        devices: device types that these layers serve.

    Raises:
        ImportError: without ``kernels``.
        ValueError: for an unknown name.
    """
    try:
        from kernels import register_kernel_mapping  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            "register_with_kernels() needs Hugging Face kernels: pip install kernels."
        ) from error
    register_kernel_mapping(kernel_mapping(names, devices))
