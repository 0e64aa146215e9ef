"""micro-diffusion: ``FeedForwardECMoe``, expert choice inside each image."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels.expert_mlp import expert_mlp
from moe_kernels.integrations.adapter import (
    Adapter,
    backend_of,
    missing_attributes,
    random_tokens,
    why_bypassing_is_wrong,
)
from moe_kernels.integrations.fp64 import in_fp64
from moe_kernels.router import expert_choice


class MicroDiffusion(Adapter):
    """``out = Σ_e p_e · gelu(x w1_e) w2_e`` over the experts that took the token.

    Expert e takes the C = int(expert_capacity · S / E) tokens of each image with the largest p_e,
    the softmax of ``gate(x)``. The weights are (E, D, F) and (E, F, D), transposed against
    ``nn.Linear``; the kernels read them as they are.

    What the original does not do: bf16 and fp16 modules work, and under autocast the output has the
    dtype of the input.
    """

    family = "micro-diffusion"
    class_names = ("FeedForwardECMoe",)

    def why_not(self, module: Any) -> str | None:
        names = ("w1", "w2", "gate", "gelu", "num_experts", "expert_capacity")
        reason = missing_attributes(module, names)
        if reason is not None:
            return reason
        w1, w2 = module.w1, module.w2
        if w1.dim() != 3 or w2.shape != (w1.shape[0], w1.shape[2], w1.shape[1]):
            return f"w1 {tuple(w1.shape)} and w2 {tuple(w2.shape)} are not (E, D, F) and (E, F, D)"
        if w1.shape[0] != module.num_experts:
            return f"w1 has {w1.shape[0]} experts; num_experts is {module.num_experts}"
        if type(module.gelu) is not nn.GELU:
            return f"its activation is a {type(module.gelu).__name__}, not a GELU"
        return self.changed(module)

    def describe(self, module: Any) -> str:
        return f"{module.num_experts} experts, capacity factor {module.expert_capacity}"

    def changed(self, module: Any) -> str | None:
        return why_bypassing_is_wrong(module.gelu, "gelu")

    def forward(self, module: Any, x: Tensor) -> Tensor:
        batch_size, seq_len, hidden_size = x.shape
        capacity = int(module.expert_capacity * seq_len / module.num_experts)
        if capacity == 0:  # no expert takes a token, but each has a gradient of zeros
            return module.original_class.forward(module, x)
        backend = backend_of(module)
        plan = expert_choice(
            module.gate(x).flatten(0, 1),  # (B·S, E)
            capacity=capacity,
            num_groups=batch_size,
            check_finite=False,
            backend=backend,
        )
        out = expert_mlp(
            x.reshape(-1, hidden_size),
            plan,
            module.w1.transpose(1, 2),
            module.w2.transpose(1, 2),
            activation="gelu_tanh" if module.gelu.approximate == "tanh" else "gelu",
            backend=backend,
        )
        return out.view(x.shape)

    def exact(self, original: Any) -> nn.Module:
        return in_fp64(original)

    def example(self, module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = (2, max(32, module.num_experts), module.w1.shape[1])
        return (random_tokens(shape, module.w1, generator),)
