"""Routing ops: logits to weights, losses and indices in one call, and back in one call.

Both routers return ``(weights, load_balance, z_loss, terms, packed)``: routing weights (R,), the
balance loss and the z-loss as scalars, ``terms`` (2 + E,) = balance loss per sequence, mean entropy
(no gradient), mean of the routing distribution; and the indices (``ops/pack.py``).
"""

from typing import Any

import torch
from torch import Tensor

from moe_kernels.ops.operator import Operator
from moe_kernels.ops.pack import packed_sizes

RouteOutputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# Entries of `terms`.
BALANCE_PER_GROUP, ENTROPY, MEAN_PROB = 0, 1, 2


def empty_outputs(router_logits: Tensor, num_groups: int, rows: int, top_k: int) -> RouteOutputs:
    """Uninitialised results of a routing op."""
    tokens, experts = router_logits.shape
    length = sum(packed_sizes(tokens, experts, num_groups, rows, top_k))
    return (
        router_logits.new_empty(rows),
        router_logits.new_empty(()),
        router_logits.new_empty(()),
        router_logits.new_empty(2 + experts),
        torch.empty(length, dtype=torch.int32, device=router_logits.device),
    )


def _token_choice_fake(
    router_logits: Tensor,
    selection_bias: Tensor | None,
    top_k: int,
    affinity: str,
    per_token: bool,
    scale: float,
    num_expert_groups: int,
    top_k_groups: int,
    num_groups: int,
    check_finite: bool,
) -> RouteOutputs:
    return empty_outputs(router_logits, num_groups, router_logits.shape[0] * top_k, top_k)


def _expert_choice_fake(
    router_logits: Tensor,
    capacity: int,
    affinity: str,
    per_token: bool,
    scale: float,
    num_groups: int,
    check_finite: bool,
) -> RouteOutputs:
    rows = router_logits.shape[1] * num_groups * capacity
    return empty_outputs(router_logits, num_groups, rows, 0)


def _save(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: RouteOutputs,
    num_groups: int,
    affinity: str,
    per_token: bool,
    scale: float,
) -> None:
    weights, packed = output[0], output[4]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(packed)
    ctx.save_for_backward(inputs[0], packed)
    ctx.settings = (weights.shape[0], num_groups, affinity, per_token, scale)
    ctx.num_inputs = len(inputs)


def _save_token_choice(ctx: Any, inputs: tuple[Any, ...], output: RouteOutputs) -> None:
    _, _, _, affinity, per_token, scale, _, _, num_groups, _ = inputs
    _save(ctx, inputs, output, num_groups, affinity, per_token, scale)


def _save_expert_choice(ctx: Any, inputs: tuple[Any, ...], output: RouteOutputs) -> None:
    _, _, affinity, per_token, scale, num_groups, _ = inputs
    _save(ctx, inputs, output, num_groups, affinity, per_token, scale)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    router_logits, packed = ctx.saved_tensors
    dlogits = route_bwd[ctx.backend](router_logits, packed, *gradients[:4], *ctx.settings)
    return (dlogits, *(None,) * (ctx.num_inputs - 1))


def _route_bwd_fake(router_logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(router_logits, memory_format=torch.contiguous_format)


route_bwd = Operator(
    "route_bwd(Tensor router_logits, Tensor packed, Tensor? dweights, Tensor? dload_balance, "
    "Tensor? dz_loss, Tensor? dterms, SymInt num_rows, SymInt num_groups, str affinity, "
    "bool per_token, float scale) -> Tensor",
    _route_bwd_fake,
)

token_choice = Operator(
    "token_choice(Tensor router_logits, Tensor? selection_bias, SymInt top_k, str affinity, "
    "bool per_token, float scale, SymInt num_expert_groups, SymInt top_k_groups, "
    "SymInt num_groups, bool check_finite) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _token_choice_fake,
    setup_context=_save_token_choice,
    backward=_backward,
)

expert_choice = Operator(
    "expert_choice(Tensor router_logits, SymInt capacity, str affinity, bool per_token, "
    "float scale, SymInt num_groups, bool check_finite) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _expert_choice_fake,
    setup_context=_save_expert_choice,
    backward=_backward,
)


def _save_affinity(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.affinity = inputs[1]


def _affinity_backward(ctx: Any, dprobs: Tensor) -> tuple[Tensor, None]:
    (probs,) = ctx.saved_tensors
    if ctx.affinity == "identity":
        return dprobs, None
    if ctx.affinity == "sigmoid":
        return dprobs * probs * (1 - probs), None
    product = dprobs * probs
    return product - probs * product.sum(dim=-1, keepdim=True), None


affinity = Operator(
    "affinity(Tensor router_logits, str affinity) -> Tensor",
    lambda router_logits, affinity: torch.empty_like(
        router_logits, memory_format=torch.contiguous_format
    ),
    setup_context=_save_affinity,
    backward=_affinity_backward,
    twice_differentiable=True,
)


def _save_similarity(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]
) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], output[1])


def _similarity_backward(ctx: Any, dloss: Tensor, _: None) -> tuple[Tensor, None, None]:
    router_logits, pair_weights = ctx.saved_tensors
    return similarity_bwd[ctx.backend](router_logits, pair_weights, dloss), None, None


similarity_bwd = Operator(
    "similarity_bwd(Tensor router_logits, Tensor pair_weights, Tensor dloss) -> Tensor",
    lambda router_logits, pair_weights, dloss: torch.empty_like(
        router_logits, memory_format=torch.contiguous_format
    ),
)

similarity = Operator(
    "similarity(Tensor router_logits, Tensor row_experts, Tensor row_offsets) -> (Tensor, Tensor)",
    lambda router_logits, row_experts, row_offsets: (
        router_logits.new_empty(()),
        router_logits.new_empty(router_logits.shape[1], router_logits.shape[1]),
    ),
    setup_context=_save_similarity,
    backward=_similarity_backward,
)
