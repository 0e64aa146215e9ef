"""Inputs and comparisons on any device, for the tests that a GPU runs at real sizes.

Without a GPU, the same tests run on the CPU at tiny sizes where Triton's interpreter is on, so that
they are known to work before they meet one. bf16 is left out there: Triton 3.9's interpreter
multiplies it wrongly.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.testing import assert_as_accurate

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
_NO_INTERPRETER = pytest.mark.skipif(
    not _INTERPRETED or BACKENDS["triton"].why_not("expert_mlp", "cpu") is not None,
    reason="runs on the CPU where Triton's interpreter is on",
)
# Every test of these files takes one of them.
DEVICES = (
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("cpu", marks=_NO_INTERPRETER, id="interpreter"),
)

# The same for what runs on the CUDA backend alone; its simulated GPU knows all dtypes.
_WHY_NO_CUDA_KERNELS = BACKENDS["cuda"].why_no_kernel("expert_choice")
_NO_SIMULATOR = pytest.mark.skipif(
    BACKENDS["cuda"].why_not("expert_choice", "cpu") is not None,
    reason="runs on the CPU where the CUDA backend has a simulated GPU",
)
CUDA_DEVICES = (
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("cpu", marks=_NO_SIMULATOR, id="simulated"),
)
# Who routes and moves rows, as a request for a backend.
ROUTED_BY = (
    pytest.param("triton"),
    pytest.param(
        "cuda,triton",
        id="cuda",
        marks=pytest.mark.skipif(
            _WHY_NO_CUDA_KERNELS is not None, reason=f"the cuda backend {_WHY_NO_CUDA_KERNELS}"
        ),
    ),
)

Tensors = dict[str, Tensor]


def sixteen_bit(device: str) -> torch.dtype:
    """bf16, or what the interpreter computes correctly."""
    return torch.bfloat16 if device == "cuda" else torch.float16


def draw(device: str, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1) -> Tensor:
    """Normal numbers; every test starts with the same seed."""
    return (torch.randn(shape, device=device) * scale).to(dtype)


def require_memory(gib: float) -> None:
    """Skip the test where the GPU has not that much free."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of free device memory, {free:.0f} are there")


def equal_plan(device: str, tokens: int, experts: int, groups: int = 2) -> mk.RoutingPlan:
    """Expert choice: equal groups."""
    return mk.expert_choice(draw(device, tokens, experts), 2.0, num_groups=groups)


def ragged_plan(device: str, tokens: int, experts: int, top_k: int = 2) -> mk.RoutingPlan:
    """Token choice of all experts but the second, which gets no rows."""
    logits = draw(device, tokens, experts)
    logits[:, 1] = -40.0
    return mk.token_choice(logits, top_k)


def mlp_tensors(
    plan: mk.RoutingPlan,
    hidden: int,
    inner: int,
    activation: str,
    dtype: torch.dtype,
    bias: bool = False,
    shared: bool = False,
) -> Tensors:
    """x, routing weights, matrices, and biases and the shared expert's output if asked for."""
    device, experts = plan.token_indices.device.type, plan.num_experts
    into = 2 * inner if activation == "swiglu" else inner
    tensors = {
        "x": draw(device, plan.num_tokens, hidden, dtype=dtype),
        "routing_weights": plan.routing_weights.detach().clone(),
        "w_in": draw(device, experts, into, hidden, dtype=dtype, scale=hidden**-0.5),
        "w_out": draw(device, experts, hidden, inner, dtype=dtype, scale=inner**-0.5),
    }
    if bias:
        tensors["bias_in"] = draw(device, experts, into, dtype=dtype)
        tensors["bias_out"] = draw(device, experts, hidden, dtype=dtype)
    if shared:
        tensors["shared"] = draw(device, plan.num_tokens, hidden, dtype=dtype)
    return tensors


def mlp_results(
    plan: mk.RoutingPlan,
    tensors: Tensors,
    upstream: Tensor,
    activation: str,
    backend: str = "triton",
    dtype: torch.dtype | None = None,
) -> Tensors:
    """The output as ``"out"``, and the gradient of every tensor by its name.

    Args:
        plan: whose routing weights those of ``tensors`` replace.
        tensors: of ``mlp_tensors``.
        upstream: gradient of the output.
        activation: of the experts.
        backend: that computes.
        dtype: to compute in; ``None`` takes the tensors as they are.
    """
    leaves = {
        name: tensor.detach().to(torch.float64 if dtype == torch.float64 else tensor.dtype)
        for name, tensor in tensors.items()
    }
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    plan = dataclasses.replace(_without_kernel(plan), routing_weights=leaves["routing_weights"])
    others = {name: leaf for name, leaf in leaves.items() if name not in ("x", "routing_weights")}
    out = mk.expert_mlp(leaves["x"], plan, **others, activation=activation, backend=backend)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def _without_kernel(plan: mk.RoutingPlan) -> mk.RoutingPlan:
    """The plan with its indices as fields, which ``dataclasses.replace`` can copy."""
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return mk.RoutingPlan(**{**fields, "fused": None})


def assert_mlp_accurate(
    plan: mk.RoutingPlan, tensors: Tensors, activation: str, backend: str = "triton"
) -> Tensors:
    """Each result errs at most twice as much as plain PyTorch in the same dtype; returns them."""
    upstream = torch.randn_like(tensors["x"])
    actual = mlp_results(plan, tensors, upstream, activation, backend)
    plain = mlp_results(plan, tensors, upstream, activation, "reference")
    exact = mlp_results(plan, tensors, upstream, activation, "reference", torch.float64)
    for name, result in actual.items():
        assert result.dtype == plain[name].dtype, name
        assert bool(torch.isfinite(result).all()), name
        assert_as_accurate(result, plain[name], exact[name])
    return actual


def make_layer(
    device: str,
    kind: str,
    dtype: torch.dtype,
    hidden: int,
    inner: int,
    experts: int,
    **options: Any,
) -> mk.MoE:
    """An expert-choice or a token-choice layer."""
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    if kind == "expert choice":
        router = mk.ExpertChoiceRouter(hidden, experts, 2.0, **factory)
        return mk.MoE(hidden, inner, experts, router, "gelu_tanh", True, **options, **factory)
    router = mk.TokenChoiceRouter(hidden, experts, 2, **factory)
    return mk.MoE(hidden, inner, experts, router, "swiglu", **options, **factory)


def layer_step(layer: Callable[..., Any], x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output and all gradients of one training step, losses included."""
    out, plan = layer(x)
    loss = mk.load_balance_loss(plan) + 0.1 * mk.router_z_loss(plan)
    parameters = list(getattr(layer, "_orig_mod", layer).parameters())
    gradients = torch.autograd.grad(
        [out, loss], [x, *parameters], [upstream, torch.ones_like(loss)]
    )
    return [out.detach(), *gradients]


LAYERS = ("expert choice", "token choice")
