"""Routing on the CPU: kernels of the routing ops."""

import torch
from torch import Tensor

from moe_kernels.backends.cpu.native import AFFINITIES, DTYPES, address, native
from moe_kernels.checks import check_finite_logits
from moe_kernels.ops import route as ops


def _token_choice_kernel(
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
    finite = native.token_choice_fwd(
        DTYPES[logits.dtype],
        logits.data_ptr(),
        address(selection_bias),
        weights.data_ptr(),
        load_balance.data_ptr(),
        z_loss.data_ptr(),
        terms.data_ptr(),
        packed.data_ptr(),
        tokens,
        experts,
        num_groups,
        top_k,
        num_expert_groups,
        top_k_groups,
        AFFINITIES[affinity],
        per_token,
        scale,
        torch.get_num_threads(),
    )
    if check_finite and not finite:
        check_finite_logits(logits)
    return outputs


def _expert_choice_kernel(
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
    finite = native.expert_choice_fwd(
        DTYPES[logits.dtype],
        logits.data_ptr(),
        weights.data_ptr(),
        load_balance.data_ptr(),
        z_loss.data_ptr(),
        terms.data_ptr(),
        packed.data_ptr(),
        tokens,
        experts,
        num_groups,
        capacity,
        AFFINITIES[affinity],
        per_token,
        scale,
        torch.get_num_threads(),
    )
    if check_finite and not finite:
        check_finite_logits(logits)
    return outputs


def _route_bwd_kernel(
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
    tokens, experts = logits.shape
    dlogits = torch.empty_like(logits)
    dweights = None if dweights is None else dweights.contiguous()
    dterms = None if dterms is None else dterms.contiguous()
    native.route_bwd(
        DTYPES[logits.dtype],
        logits.data_ptr(),
        packed.data_ptr(),
        address(dweights),
        address(dload_balance),
        address(dz_loss),
        address(dterms),
        dlogits.data_ptr(),
        tokens,
        experts,
        num_groups,
        num_rows,
        AFFINITIES[affinity],
        per_token,
        scale,
        torch.get_num_threads(),
    )
    return dlogits


def _affinity_kernel(router_logits: Tensor, affinity: str) -> Tensor:
    logits = router_logits.contiguous()
    probs = torch.empty_like(logits)
    native.affinity_fwd(
        DTYPES[logits.dtype],
        logits.data_ptr(),
        probs.data_ptr(),
        *logits.shape,
        AFFINITIES[affinity],
        torch.get_num_threads(),
    )
    return probs


ops.token_choice.implement("cpu", _token_choice_kernel, ("cpu",))
ops.expert_choice.implement("cpu", _expert_choice_kernel, ("cpu",))
ops.route_bwd.implement("cpu", _route_bwd_kernel, ("cpu",))
ops.affinity.implement("cpu", _affinity_kernel, ("cpu",))
