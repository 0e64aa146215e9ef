"""Routing in CUDA C++: one launch a router, one for the backward of both."""

import torch
from torch import Tensor

from moe_kernels.backends.cuda.native import (
    AFFINITIES,
    DEVICE_TYPES,
    address,
    counters,
    native,
    place,
)
from moe_kernels.checks import check_finite_logits
from moe_kernels.ops import route as ops

# Which blocks share a group of expert choice (TeamChoice in csrc/cuda/kernels.hpp): 0 leaves it to
# the launcher.
TEAM = 0

_FLAG_BYTES = 16  # before the workspace: whether a logit is not finite


def _workspace(size: int, logits: Tensor) -> Tensor:
    return torch.empty(_FLAG_BYTES + size, dtype=torch.uint8, device=logits.device)


def _check_finite(workspace: Tensor, logits: Tensor) -> None:
    if int(workspace[:4].view(torch.int32)):
        check_finite_logits(logits)


def _token_choice(
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
) -> ops.RouteOutputs:
    logits = router_logits.contiguous()
    tokens, experts = logits.shape
    outputs = ops.empty_outputs(logits, num_groups, tokens * top_k, top_k)
    weights, load_balance, z_loss, terms, packed = outputs
    if selection_bias is not None:
        selection_bias = selection_bias.to(logits.dtype).contiguous()
    where = place(logits)
    size = native.token_choice_workspace(tokens, experts, num_groups, top_k, where[0])
    workspace = _workspace(size, logits)
    native.token_choice_fwd(
        *where,
        logits.data_ptr(),
        address(selection_bias),
        weights.data_ptr(),
        load_balance.data_ptr(),
        z_loss.data_ptr(),
        terms.data_ptr(),
        packed.data_ptr(),
        workspace.data_ptr(),
        workspace.data_ptr() + _FLAG_BYTES,
        counters.take(where),
        tokens,
        experts,
        num_groups,
        top_k,
        num_expert_groups,
        top_k_groups,
        AFFINITIES[affinity],
        per_token,
        scale,
    )
    if check_finite:
        _check_finite(workspace, logits)
    return outputs


def _expert_choice(
    router_logits: Tensor,
    capacity: int,
    affinity: str,
    per_token: bool,
    scale: float,
    num_groups: int,
    check_finite: bool,
) -> ops.RouteOutputs:
    logits = router_logits.contiguous()
    tokens, experts = logits.shape
    outputs = ops.empty_outputs(logits, num_groups, experts * num_groups * capacity, 0)
    weights, load_balance, z_loss, terms, packed = outputs
    where = place(logits)
    size = native.expert_choice_workspace(tokens, experts, num_groups, TEAM, where[0])
    workspace = _workspace(size, logits)
    native.expert_choice_fwd(
        *where,
        logits.data_ptr(),
        weights.data_ptr(),
        load_balance.data_ptr(),
        z_loss.data_ptr(),
        terms.data_ptr(),
        packed.data_ptr(),
        workspace.data_ptr(),
        workspace.data_ptr() + _FLAG_BYTES,
        counters.take(where),
        tokens,
        experts,
        num_groups,
        capacity,
        AFFINITIES[affinity],
        per_token,
        scale,
        TEAM,
    )
    if check_finite:
        _check_finite(workspace, logits)
    return outputs


def _route_bwd(
    router_logits: Tensor,
    packed: Tensor,
    dweights: Tensor | None,
    dload_balance: Tensor | None,
    dz_loss: Tensor | None,
    dterms: Tensor | None,
    num_rows: int,
    num_groups: int,
    affinity: str,
    per_token: bool,
    scale: float,
) -> Tensor:
    logits = router_logits.contiguous()
    dlogits = torch.empty_like(logits)
    dweights = None if dweights is None else dweights.contiguous()
    dterms = None if dterms is None else dterms.contiguous()
    native.route_bwd(
        *place(logits),
        logits.data_ptr(),
        packed.data_ptr(),
        address(dweights),
        address(dload_balance),
        address(dz_loss),
        address(dterms),
        dlogits.data_ptr(),
        *logits.shape,
        num_groups,
        num_rows,
        AFFINITIES[affinity],
        per_token,
        scale,
    )
    return dlogits


def _affinity(router_logits: Tensor, affinity: str) -> Tensor:
    logits = router_logits.contiguous()
    probs = torch.empty_like(logits)
    native.affinity_fwd(
        *place(logits), logits.data_ptr(), probs.data_ptr(), *logits.shape, AFFINITIES[affinity]
    )
    return probs


ops.token_choice.implement("cuda", _token_choice, DEVICE_TYPES)
ops.expert_choice.implement("cuda", _expert_choice, DEVICE_TYPES)
ops.route_bwd.implement("cuda", _route_bwd, DEVICE_TYPES)
ops.affinity.implement("cuda", _affinity, DEVICE_TYPES)
