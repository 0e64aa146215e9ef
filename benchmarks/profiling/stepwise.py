"""Ours stage by stage: a layer from the public functions, without the fused expert MLP.

It computes what ``mk.MoE`` computes, slower: every stage is an operator of its own, so that a
profile shows the share of each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_kernels as mk
from benchmarks.entry import Inputs, Run
from benchmarks.stages import dit_moe_layer
from benchmarks.stages.common import leaf
from moe_kernels.backends import resolve

NAME = "ours (stage by stage)"


def build(stage: str, inputs: Inputs) -> Run | None:
    """A run of the layer; ``None`` for stages that are no layer."""
    if stage == "dit_moe_layer":
        return _token_choice(inputs)
    if stage == "ec_layer":
        return _expert_choice(inputs)
    return None


def _token_choice(inputs: Inputs) -> Run:
    leaves = {name: leaf(tensor) for name, tensor in inputs.leaves.items()}
    top_k = inputs.fixed["shape"].get("K", dit_moe_layer.TOP_K)

    def call() -> tuple[Tensor, ...]:
        x, router, w_in, w_out, *shared = leaves.values()
        tokens = x.flatten(0, 1)
        plan = mk.token_choice(_logits(tokens, router), top_k)
        rows = mk.dispatch(tokens, plan)
        h = mk.grouped_gemm(rows, w_in, plan.expert_offsets)
        y = mk.grouped_gemm(_activate(h, "swiglu"), w_out, plan.expert_offsets)
        term = _shared_expert(tokens, *shared) if shared else None
        out = mk.combine(y, plan, shared=term).view_as(x)
        return (out, mk.load_balance_loss(plan)) if torch.is_grad_enabled() else (out,)

    return Run(call, dit_moe_layer.OUTPUTS, {name: [tensor] for name, tensor in leaves.items()})


def _expert_choice(inputs: Inputs) -> Run:
    leaves = {name: leaf(tensor) for name, tensor in inputs.leaves.items()}

    def call() -> tuple[Tensor, ...]:
        x, router, w_in, bias_in, w_out, bias_out = leaves.values()
        tokens = x.flatten(0, 1)
        plan = mk.expert_choice(
            _logits(tokens, router), capacity=inputs.fixed["C"], num_groups=x.shape[0]
        )
        per_expert = plan.rows_per_expert
        h = mk.grouped_gemm(
            mk.dispatch(tokens, plan), w_in, plan.expert_offsets, rows_per_expert=per_expert
        )
        a = _activate(_add_bias(h, bias_in), "gelu_tanh")
        y = mk.grouped_gemm(a, w_out, plan.expert_offsets, rows_per_expert=per_expert)
        return (mk.combine(_add_bias(y, bias_out), plan).view_as(x),)

    return Run(call, ("out",), {name: [tensor] for name, tensor in leaves.items()})


def _logits(tokens: Tensor, router: Tensor) -> Tensor:
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return F.linear(tokens.to(dtype), router.to(dtype))


def _activate(h: Tensor, activation: str) -> Tensor:
    return resolve("activation", h.device)(h, activation)


def _shared_expert(tokens: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    return F.linear(_activate(F.linear(tokens, w_in), "swiglu"), w_out)


def _add_bias(rows: Tensor, bias: Tensor) -> Tensor:
    """(R, ·) rows of experts that have equally many, each with its expert's bias."""
    return (rows.view(bias.shape[0], -1, bias.shape[1]) + bias.unsqueeze(1)).view_as(rows)
