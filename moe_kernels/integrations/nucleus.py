"""Nucleus-Image in diffusers: ``NucleusMoELayer``, expert choice inside each image."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_kernels.combine import combine
from moe_kernels.dispatch import dispatch
from moe_kernels.expert_mlp import expert_mlp
from moe_kernels.integrations.adapter import (
    Adapter,
    backend_of,
    missing_attributes,
    random_tokens,
    why_bypassing_is_wrong,
)
from moe_kernels.plan import RoutingPlan
from moe_kernels.router import expert_choice


class Nucleus(Adapter):
    """Experts take C = max(1, ⌈f S / E⌉) tokens of an image by an affinity of timestep and token.

    ``out = shared_expert(x) + route_scale · Σ_e a_e / Σ_e' a_e' · down(silu(gate x) · up x)``, both
    sums over the experts that took the token. The weights are (E, D, 2F) and (E, F, D), transposed
    against ``nn.Linear``; the kernels read them as they are.
    """

    family = "Nucleus-Image"
    class_names = ("NucleusMoELayer",)

    def why_not(self, module: Any) -> str | None:
        names = ("gate", "experts", "shared_expert", "num_experts", "capacity_factor")
        reason = missing_attributes(module, (*names, "use_sigmoid", "route_scale"))
        reason = reason or missing_attributes(module.experts, ("gate_up_proj", "down_proj"))
        if reason is not None:
            return reason
        w_in, w_out = module.experts.gate_up_proj, module.experts.down_proj
        if w_out.dim() != 3 or w_in.shape != (w_out.shape[0], w_out.shape[2], 2 * w_out.shape[1]):
            return (
                f"gate_up_proj {tuple(w_in.shape)} and down_proj {tuple(w_out.shape)} are not "
                "(E, D, 2F) and (E, F, D)"
            )
        return self.changed(module)

    def describe(self, module: Any) -> str:
        return (
            f"{module.num_experts} experts, capacity factor {module.capacity_factor}, shared expert"
        )

    def changed(self, module: Any) -> str | None:
        return why_bypassing_is_wrong(module.experts, "experts", "SwiGLUExperts")

    def forward(
        self,
        module: Any,
        hidden_states: Tensor,
        hidden_states_unmodulated: Tensor,
        timestep: Tensor | None = None,
    ) -> Tensor:
        batch_size, seq_len, hidden_size = hidden_states.shape
        backend = backend_of(module)
        router_input = hidden_states_unmodulated
        if timestep is not None:
            timestep = timestep.unsqueeze(1).expand(-1, seq_len, -1)
            router_input = torch.cat([timestep, hidden_states_unmodulated], dim=-1)
        capacity = max(1, math.ceil(module.capacity_factor * seq_len / module.num_experts))
        plan = expert_choice(
            module.gate(router_input).flatten(0, 1),  # (B·S, E)
            capacity=capacity,
            num_groups=batch_size,
            affinity="sigmoid" if module.use_sigmoid else "softmax",
            normalize="none" if module.use_sigmoid else "per_token",
            scale=1.0 if module.use_sigmoid else module.route_scale,
            check_finite=False,
            backend=backend,
        )
        if module.use_sigmoid:
            plan = _normalized(plan, module.route_scale, backend)
        out = expert_mlp(
            hidden_states.reshape(-1, hidden_size),
            plan,
            module.experts.gate_up_proj.transpose(1, 2),
            module.experts.down_proj.transpose(1, 2),
            activation="swiglu",
            shared=module.shared_expert(hidden_states).reshape(-1, hidden_size),
            backend=backend,
        )
        return out.view(hidden_states.shape)

    def example(self, module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
        w_in = module.experts.gate_up_proj
        hidden_size = w_in.shape[1]
        tokens, unmodulated = (
            random_tokens((2, 32, hidden_size), w_in, generator) for _ in range(2)
        )
        timestep = module.gate.weight.shape[1] - hidden_size
        if timestep == 0:
            return tokens, unmodulated
        return tokens, unmodulated, random_tokens((2, timestep), w_in, generator)


def _normalized(plan: RoutingPlan, scale: float, backend: str | None) -> RoutingPlan:
    """The plan with the original's denominator, ``Σ a + 1e-12``.

    Sigmoid affinities of a token can all be that small; softmax affinities would have to be less
    than 1e-6 of a token's probability together to differ from the router's own normalisation.
    """
    ones = plan.routing_weights.new_ones(plan.num_rows, 1)
    sums = combine(ones, plan, backend=backend)  # (T, 1)
    weights = plan.routing_weights / (dispatch(sums, plan, backend=backend)[:, 0] + 1e-12)
    return replace(plan, routing_weights=weights * scale)
