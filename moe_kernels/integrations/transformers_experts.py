"""Experts of transformers 5: every class that its ``ExpertsInterface`` serves.

The model's own router has chosen; what is served here is dispatch, experts and combine. Two ways
in: ``moe_kernels.apply(model)``, or ``register_with_transformers()`` and then
``experts_implementation="moe_kernels"``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.choices import plan_from_choices
from moe_kernels.combine import combine
from moe_kernels.dispatch import dispatch
from moe_kernels.expert_mlp import expert_mlp, grouped_gemm
from moe_kernels.integrations.adapter import (
    Adapter,
    backend_of,
    missing_attributes,
    random_tokens,
    why_bypassing_is_wrong,
)
from moe_kernels.plan import RoutingPlan

NAME = "moe_kernels"
# What the decorator of the interface writes on an instance.
LAYOUT = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
# Activations without a gate by the name of their class in transformers.
UNGATED = {"GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def register_with_transformers() -> None:
    """Make ``"moe_kernels"`` an experts implementation of transformers.

    Then ``AutoModel.from_pretrained(..., experts_implementation="moe_kernels")`` or
    ``model.set_experts_implementation("moe_kernels")``.

    Raises:
        ImportError: without transformers, or with a version that has no ``ExpertsInterface``.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "register_with_transformers() needs transformers >= 5 with its ExpertsInterface: "
            "pip install 'dit-moe-kernels[test]', or transformers alone."
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts of a model for the choices of its router.

    ``out[t] = Σ_k top_k_weights[t, k] · expert_{top_k_index[t, k]}(hidden_states[t])``.

    Args:
        self: the experts module of the model: ``gate_up_proj`` or ``up_proj``, and ``down_proj``.
        hidden_states: (T, D).
        top_k_index: (T, K); indices of E mark experts of other ranks.
        top_k_weights: (T, K).

    Returns:
        (T, D) in the dtype of ``hidden_states``.
    """
    if getattr(self, "_is_expert_parallel", False):
        elsewhere = top_k_index >= self.num_experts
        top_k_weights = top_k_weights.masked_fill(elsewhere, 0.0)
        top_k_index = top_k_index.clamp(max=self.num_experts - 1)
    plan = plan_from_choices(top_k_index, top_k_weights, self.num_experts)
    w_in, w_out = _weights(self)
    tokens = hidden_states
    if not torch.is_autocast_enabled(tokens.device.type):
        tokens = tokens.to(w_in.dtype)
    run = _fused if _activation(self) is not None else _by_stages
    return run(self, tokens, plan, w_in, w_out).to(hidden_states.dtype)


def _fused(self: Any, tokens: Tensor, plan: RoutingPlan, w_in: Tensor, w_out: Tensor) -> Tensor:
    bias_in, bias_out = _biases(self)
    activation = _activation(self)
    assert activation is not None
    return expert_mlp(
        tokens,
        plan,
        w_in,
        w_out,
        activation=activation,
        bias_in=bias_in,
        bias_out=bias_out,
        backend=backend_of(self),
    )


def _by_stages(self: Any, tokens: Tensor, plan: RoutingPlan, w_in: Tensor, w_out: Tensor) -> Tensor:
    """With the model's own activation between the products."""
    backend = backend_of(self)
    bias_in, bias_out = _biases(self)
    rows = dispatch(tokens, plan, backend=backend)  # (R, D)
    h = grouped_gemm(rows, w_in, plan.expert_offsets, backend=backend)
    h = _add_bias(h, bias_in, plan)
    a = self._apply_gate(h) if self.has_gate else self.act_fn(h)
    y = _add_bias(grouped_gemm(a, w_out, plan.expert_offsets, backend=backend), bias_out, plan)
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    return combine(y, plan, backend=backend)


def _add_bias(rows: Tensor, bias: Tensor | None, plan: RoutingPlan) -> Tensor:
    """Rows plus their expert's bias, added wide; under autocast it stays in the bias's dtype."""
    if bias is None:
        return rows
    wide = torch.promote_types(rows.dtype, torch.float32)
    # Unlike indexing, an embedding adds up its gradient in a fixed order.
    total = rows.to(wide) + F.embedding(plan.expert_of_row, bias.to(wide))
    return total.to(torch.promote_types(rows.dtype, bias.dtype))


def _weights(self: Any) -> tuple[Tensor, Tensor]:
    """w_in (E, F or 2F, D) and w_out (E, D, F), as views of the model's weights."""
    w_in = self.gate_up_proj if self.has_gate else self.up_proj
    if self.is_transposed:
        return w_in.transpose(1, 2), self.down_proj.transpose(1, 2)
    return w_in, self.down_proj


def _biases(self: Any) -> tuple[Tensor | None, Tensor | None]:
    if not self.has_bias:
        return None, None
    return (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias), self.down_proj_bias


def _activation(self: Any) -> str | None:
    """The kernels' name of what is between the products, ``None`` when they do not have it."""
    act = getattr(self, "act_fn", None)
    if self.has_post_expert_norm or not isinstance(act, nn.Module):
        return None
    if why_bypassing_is_wrong(act, "act_fn") is not None:
        return None
    name = type(act).__name__
    if not self.has_gate:
        return UNGATED.get(name)
    standard = getattr(type(self)._apply_gate, "__name__", "") == "_default_apply_gate"
    silu = standard and name in ("SiLU", "SiLUActivation")
    return "swiglu" if silu and self.is_concatenated else None


class TransformersExperts(Adapter):
    """The experts module of a transformers model; see ``experts_forward``."""

    family = "transformers"
    class_names = ("classes with transformers' use_experts_implementation",)

    def matches(self, module: Any, class_name: str) -> bool:
        return all(hasattr(module, name) for name in LAYOUT)

    def why_not(self, module: Any) -> str | None:
        w_in = "gate_up_proj" if module.has_gate else "up_proj"
        reason = missing_attributes(module, (w_in, "down_proj", "num_experts"))
        if reason is None and module.has_bias:
            reason = missing_attributes(module, (f"{w_in}_bias", "down_proj_bias"))
        if reason is not None:
            return reason
        first, second = _weights(module)
        for weight in (first, second):
            if weight.dim() != 3 or weight.dtype not in DTYPES:
                return f"a weight is {weight.dtype} of shape {tuple(weight.shape)}"
        halves = 2 if module.has_gate else 1
        if first.shape != (second.shape[0], halves * second.shape[2], second.shape[1]):
            return f"its weights {tuple(first.shape)} and {tuple(second.shape)} do not fit together"
        return None

    def describe(self, module: Any) -> str:
        fused = _activation(module)
        how = f"fused {fused}" if fused else "with the model's own activation"
        return f"{module.num_experts} experts, {how}"

    def forward(self, module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The classes name their arguments differently, but one is of integers.
        index, weights = sorted((*args, *kwargs.values()), key=torch.is_floating_point)
        return experts_forward(module, hidden_states, index, weights)

    def exact(self, original: Any) -> nn.Module:
        copied: Any = super().exact(original)
        # grouped_mm, the default of transformers, has no fp64.
        copied.config._experts_implementation_internal = "eager"
        return copied

    def example(self, module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
        w_in, _ = _weights(module)
        tokens = random_tokens((64, w_in.shape[2]), w_in, generator)
        top_k = min(2, module.num_experts)
        scores = torch.rand(64, module.num_experts, generator=generator)
        weights, index = scores.topk(top_k)
        return tokens, index.to(w_in.device), weights.to(w_in.device, w_in.dtype)
