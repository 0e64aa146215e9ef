"""Rows that travel by DeepEP instead of all-to-all: token choice in bf16 on CUDA.

Written from DeepEP's documentation of its normal kernels (class ``Buffer``, ``docs/legacy.md``) and
tested with a stand-in for it; it has not been run with the library itself. A token travels once to
each rank that has any of its experts, which sums their outputs; so less is sent than by the other
transports, and the sum over ranks is rounded to bf16 once more.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from moe_kernels.autocast import autocast_operands
from moe_kernels.distributed.debug import check_collective
from moe_kernels.layers import GroupedExperts
from moe_kernels.plan import RoutingPlan
from moe_kernels.selection import plan_from_selection

# What the normal kernels of DeepEP take.
DEVICE_TYPE = "cuda"
DTYPE = torch.bfloat16

# One for each process group, as large as the widest layer needs.
_buffers: dict[str, Any] = {}


def load() -> Any:
    """The module ``deep_ep``.

    Raises:
        ValueError: it is not installed, or is a version without the class ``Buffer``.
    """
    try:
        module = importlib.import_module("deep_ep")
    except ImportError as error:
        raise ValueError(
            f'transport="deepep" needs the package deep_ep, which cannot be imported ({error}); '
            "install it from https://github.com/deepseek-ai/DeepEP, or use another transport."
        ) from error
    if not hasattr(module, "Buffer"):
        raise ValueError(
            'transport="deepep" needs deep_ep.Buffer, which this version of deep_ep does not '
            "have; use another transport."
        )
    return module


@dataclass(eq=False)
class _Journey:
    """Where tokens went, for the way back and for the gradients."""

    buffer: Any
    group: distributed.ProcessGroup
    num_experts: int
    handle: Any = None
    event: Any = None
    choices: Tensor | None = None
    num_rows: int = 0

    def check(self, name: str, rows: Tensor) -> None:
        check_collective(f"DeepEP {name}", self.group, rows.dtype, rows.shape[1])


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weights: Tensor, choices: Tensor, journey: _Journey
    ) -> tuple[Tensor, Tensor]:
        ctx.journey = journey
        journey.check("dispatch", tokens)
        per_rank, per_node, per_expert, is_in_rank, _ = journey.buffer.get_dispatch_layout(
            choices, journey.num_experts
        )
        arrived, journey.choices, own_weights, counts, journey.handle, journey.event = (
            journey.buffer.dispatch(
                tokens,
                topk_idx=choices,
                topk_weights=weights,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=is_in_rank,
                num_tokens_per_expert=per_expert,
                async_finish=True,
            )
        )
        journey.num_rows = sum(counts)
        return arrived, own_weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, darrived: Tensor, dweights: Tensor) -> tuple[Tensor, Tensor, None, None]:
        journey: _Journey = ctx.journey
        journey.check("gradients of dispatch", darrived)
        dtokens, dweights, _ = journey.buffer.combine(
            darrived.contiguous(), journey.handle, topk_weights=dweights.contiguous()
        )
        return dtokens, dweights, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, done: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        journey.check("combine", done)
        combined: Tensor = journey.buffer.combine(done.contiguous(), journey.handle)[0]
        return combined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcombined: Tensor) -> tuple[Tensor, None]:
        journey: _Journey = ctx.journey
        journey.check("gradients of combine", dcombined)
        return journey.buffer.dispatch(dcombined.contiguous(), handle=journey.handle)[0], None


@torch.compiler.disable
def run(
    experts: GroupedExperts,
    weights: list[Any],
    x: Tensor,
    plan: RoutingPlan,
    shared: Tensor | Callable[[], Tensor] | None,
    group: distributed.ProcessGroup,
) -> Tensor:
    """As ``GroupedExperts.forward`` with this rank's ``weights``."""
    (tokens,) = autocast_operands(x)
    _check(tokens, plan)
    choices, routing_weights = _by_token(plan)
    journey = _Journey(_buffer(group, tokens), group, plan.num_experts)
    arrived, own_weights = _Dispatch.apply(tokens, routing_weights, choices, journey)
    term = shared() if callable(shared) else shared
    journey.event.current_stream_wait()
    local = _local_plan(journey, own_weights, plan.num_experts // distributed.get_world_size(group))
    done = experts.compute(arrived, local, weights)
    out: Tensor = _Combine.apply(done, journey).to(x.dtype)
    return out if term is None else out + term.to(x.dtype)


def _check(tokens: Tensor, plan: RoutingPlan) -> None:
    if plan.router != "token_choice" or plan.top_k is None:
        raise ValueError(
            'transport="deepep" needs a token choice, in which every token has K experts; this '
            f"plan is of router {plan.router!r}."
        )
    if tokens.device.type != DEVICE_TYPE or tokens.dtype != DTYPE:
        raise ValueError(
            f'transport="deepep" sends {DTYPE} on {DEVICE_TYPE}; x is {tokens.dtype} on '
            f"{tokens.device.type}. Use autocast, or another transport."
        )


def _by_token(plan: RoutingPlan) -> tuple[Tensor, Tensor]:
    """(T, K) int64 experts of each token, and (T, K) fp32 weights."""
    rows = plan.row_indices.long()
    shape = (plan.num_tokens, plan.top_k or 0)
    experts = plan.expert_of_row.gather(0, rows).long()
    weights = plan.routing_weights.gather(0, rows).float()
    return experts.view(shape), weights.view(shape)


def _local_plan(journey: _Journey, weights: Tensor, num_experts: int) -> RoutingPlan:
    """The plan of the tokens that arrived; a choice of -1 is an expert of another rank."""
    assert journey.choices is not None
    # Choices of other ranks fall into a column behind the experts.
    columns = torch.where(journey.choices < 0, num_experts, journey.choices)
    gates = weights.new_zeros(weights.shape[0], num_experts + 1).scatter(1, columns, weights)
    chosen = torch.zeros_like(gates, dtype=torch.bool).scatter(1, columns, True)
    gates = gates[:, :num_experts].contiguous()
    return plan_from_selection(
        chosen[:, :num_experts].contiguous(),
        gates.detach(),
        num_rows=journey.num_rows,
        affinity="identity",
        gates=gates,
        check_finite=False,
    )


def _buffer(group: distributed.ProcessGroup, tokens: Tensor) -> Any:
    """The group's buffer, made anew where rows are wider than it was made for."""
    kind = load().Buffer
    size = distributed.get_world_size(group)
    row_bytes = tokens.shape[1] * max(tokens.element_size(), 2)
    configs = (kind.get_dispatch_config(size), kind.get_combine_config(size))
    inside = max(config.get_nvl_buffer_size_hint(row_bytes, size) for config in configs)
    between = max(config.get_rdma_buffer_size_hint(row_bytes, size) for config in configs)
    found = _buffers.get(group.group_name)
    if found is None or found.num_nvl_bytes < inside or found.num_rdma_bytes < between:
        found = _buffers[group.group_name] = kind(group, inside, between)
    return found
