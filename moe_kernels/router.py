"""Stage 1, route: router logits to a ``RoutingPlan``, by expert choice or token choice."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe_kernels.backends import resolve
from moe_kernels.checks import (
    check_choice,
    check_floating,
    check_positive_int,
    check_same_device,
    check_shape,
    wants_finite_check,
)
from moe_kernels.plan import RoutingPlan

NORMALIZE = ("none", "per_token")


def expert_capacity(
    tokens_per_group: int,
    num_experts: int,
    capacity_factor: float = 2.0,
    *,
    rounding: str = "floor",
    multiple_of: int = 1,
) -> int:
    """Tokens that each expert takes from a group: C = max(1, round(S · f_c / E)).

    Args:
        tokens_per_group: S, tokens in the pool that an expert chooses from.
        num_experts: E.
        capacity_factor: f_c, the average number of experts per token.
        rounding: ``"floor"`` or ``"ceil"``.
        multiple_of: C is then rounded up to a multiple of this (tile-friendly).

    Returns:
        C; 0 for an empty group.

    Raises:
        ValueError: when f_c is not positive or C exceeds S.

    Source: EC-DiT (arXiv 2410.02098), section 3; the rounding is not given there.
    """
    check_choice("rounding", rounding, ("floor", "ceil"))
    check_positive_int("multiple_of", multiple_of)
    if not (isinstance(capacity_factor, (int, float)) and 0 < capacity_factor < math.inf):
        raise ValueError(f"capacity_factor is {capacity_factor!r}; expected a positive number.")
    if tokens_per_group == 0:
        return 0
    # Rounded to 9 digits first: 100 · 1.1 / 10 is a little more than 11 in floating point.
    exact = round(tokens_per_group * capacity_factor / num_experts, 9)
    capacity = max(1, math.ceil(exact) if rounding == "ceil" else math.floor(exact))
    capacity = -(-capacity // multiple_of) * multiple_of
    if capacity > tokens_per_group:
        raise ValueError(
            f"capacity_factor {capacity_factor} with {num_experts} experts, rounding {rounding!r} "
            f"and multiple_of {multiple_of} asks for {capacity} tokens an expert, but a group has "
            f"{tokens_per_group}; lower capacity_factor (at most num_experts) or multiple_of."
        )
    return capacity


def expert_choice(
    router_logits: Tensor,
    capacity_factor: float | None = None,
    *,
    capacity: int | None = None,
    num_groups: int = 1,
    affinity: str = "softmax",
    normalize: str = "none",
    scale: float = 1.0,
    rounding: str = "floor",
    multiple_of: int = 1,
    check_finite: bool | None = None,
    backend: str | None = None,
) -> RoutingPlan:
    """Let each expert take its C best tokens of every group.

    ``A = affinity(router_logits)``; expert e takes the C tokens of a group with the largest
    ``A[:, e]`` (equal affinities: lower token index first; NaN ranks with -inf). The weight of a
    row is ``scale · A[t, e]``, divided by its sum over the experts that hold t when
    ``normalize="per_token"``. A token that no expert takes has no row and its output is exactly 0.

    Args:
        router_logits: (T, E) floating point, T = num_groups · S, groups contiguous.
        capacity_factor: f_c, average experts per token; 2.0 when neither it nor ``capacity`` is
            given.
        capacity: C itself, tokens per expert and group; not together with ``capacity_factor``.
        num_groups: G; G = batch size routes inside each image, 1 over the whole batch.
        affinity: ``"softmax"`` over experts, ``"sigmoid"`` or ``"identity"``.
        normalize: ``"none"`` or ``"per_token"`` (softmax and sigmoid only).
        scale: multiplies every routing weight.
        rounding, multiple_of: see ``expert_capacity``.
        check_finite: refuse NaN and infinite logits. ``None``: on the CPU only, because reading
            the answer synchronises a GPU. Never under ``torch.compile``.
        backend: name of a backend; ``None`` lets the resolver choose.

    Returns:
        A ``RoutingPlan`` with R = E · G · C rows laid out (E, G, C).

    Raises:
        ValueError: bad shape, dtype, size or option, or non-finite logits.

    Source: EC-DiT (arXiv 2410.02098), Algorithm 1; Zhou et al. (arXiv 2202.09368).
    """
    check_floating("router_logits", router_logits, 2, "(num_tokens, num_experts)")
    num_tokens, num_experts = router_logits.shape
    capacity = _run_check(
        _check_expert_choice,
        *(num_tokens, num_experts, capacity_factor, capacity, num_groups, affinity, normalize),
        *(rounding, multiple_of),
    )
    route = resolve("expert_choice", router_logits.device, backend)
    return route(
        _routing_precision(router_logits),
        capacity=capacity,
        num_groups=num_groups,
        affinity=affinity,
        normalize=normalize,
        scale=float(scale),
        check_finite=wants_finite_check(router_logits, check_finite),
    )


def token_choice(
    router_logits: Tensor,
    top_k: int = 2,
    *,
    affinity: str = "softmax",
    normalize: str = "none",
    scale: float = 1.0,
    selection_bias: Tensor | None = None,
    num_expert_groups: int = 1,
    top_k_groups: int | None = None,
    num_groups: int = 1,
    check_finite: bool | None = None,
    backend: str | None = None,
) -> RoutingPlan:
    """Let each token take its K best experts; no token is ever dropped.

    ``A = affinity(router_logits)``; token t takes the K experts with the largest
    ``A[t, e] + selection_bias[e]`` (equal: lower expert index first; NaN ranks with -inf). The
    weight of a row is ``scale · A[t, e]`` (without the bias), divided by its sum over the K
    experts when ``normalize="per_token"``. With expert groups, a token first keeps the
    ``top_k_groups`` groups whose two best biased affinities have the largest sum.

    Args:
        router_logits: (T, E) floating point.
        top_k: K, experts per token, at most E.
        affinity: ``"softmax"`` over experts or ``"sigmoid"``.
        normalize: ``"none"`` or ``"per_token"``.
        scale: multiplies every routing weight.
        selection_bias: (E,) added for the selection only (loss-free balancing), or ``None``.
        num_expert_groups: contiguous groups of experts of equal size.
        top_k_groups: groups a token may use; ``None`` means all.
        num_groups: number of sequences in T; only the per-sequence balance loss reads it.
        check_finite: see ``expert_choice``.
        backend: name of a backend; ``None`` lets the resolver choose.

    Returns:
        A ``RoutingPlan`` with R = T · K rows, stably sorted by expert.

    Raises:
        ValueError: bad shape, dtype, size or option, or non-finite logits.

    Source: DiT-MoE (arXiv 2407.11633), eq. 1-3; group limit and bias: DeepSeek-V3
    (arXiv 2412.19437), eq. 12-16.
    """
    check_floating("router_logits", router_logits, 2, "(num_tokens, num_experts)")
    num_tokens, num_experts = router_logits.shape
    if top_k_groups is None:
        top_k_groups = num_expert_groups
    _run_check(
        _check_token_choice,
        *(num_tokens, num_experts, top_k, num_groups, affinity, normalize),
        *(num_expert_groups, top_k_groups),
    )
    if selection_bias is not None:
        check_floating("selection_bias", selection_bias, 1, "(num_experts,)")
        check_shape("selection_bias", selection_bias, (num_experts,), "(num_experts,)")
        check_same_device("selection_bias", selection_bias, "router_logits", router_logits)
    route = resolve("token_choice", router_logits.device, backend)
    return route(
        _routing_precision(router_logits),
        top_k=top_k,
        affinity=affinity,
        normalize=normalize,
        scale=float(scale),
        selection_bias=selection_bias,
        num_expert_groups=num_expert_groups,
        top_k_groups=top_k_groups,
        num_groups=num_groups,
        check_finite=wants_finite_check(router_logits, check_finite),
    )


def _routing_precision(router_logits: Tensor) -> Tensor:
    """Routing is done in fp32 whatever the input, so that bf16 logits do not make false ties."""
    return router_logits if router_logits.dtype == torch.float64 else router_logits.float()


def _run_check(check: Any, *options: Any) -> Any:
    """Check plain numbers and words; options that have passed once are not checked again."""
    if torch.compiler.is_compiling():
        return check.__wrapped__(*options)
    try:
        return check(*options)
    except TypeError:  # an option that cannot be remembered: let the check say what is wrong
        return check.__wrapped__(*options)


@lru_cache(maxsize=1024, typed=True)  # typed: top_k=True is not top_k=1
def _check_expert_choice(
    num_tokens: int,
    num_experts: int,
    capacity_factor: float | None,
    capacity: int | None,
    num_groups: int,
    affinity: str,
    normalize: str,
    rounding: str,
    multiple_of: int,
) -> int:
    """Check the options of ``expert_choice`` and return the capacity."""
    check_choice("affinity", affinity, ("softmax", "sigmoid", "identity"))
    check_choice("normalize", normalize, NORMALIZE)
    check_positive_int("num_groups", num_groups)
    if affinity == "identity" and normalize == "per_token":
        raise ValueError(
            'normalize is "per_token" with affinity "identity"; raw logits can sum to 0, '
            'so use affinity "softmax" or "sigmoid", or normalize "none".'
        )
    check_positive_int("num_experts (router_logits.shape[1])", num_experts)
    if num_tokens % num_groups:
        raise ValueError(
            f"num_groups {num_groups} does not divide the {num_tokens} tokens of router_logits; "
            "expected groups of equal size."
        )
    return _capacity(
        num_tokens // num_groups, num_experts, capacity_factor, capacity, rounding, multiple_of
    )


@lru_cache(maxsize=1024, typed=True)
def _check_token_choice(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    num_groups: int,
    affinity: str,
    normalize: str,
    num_expert_groups: int,
    top_k_groups: int,
) -> None:
    """Check the options of ``token_choice``."""
    check_choice("affinity", affinity, ("softmax", "sigmoid"))
    check_choice("normalize", normalize, NORMALIZE)
    check_positive_int("top_k", top_k)
    check_positive_int("num_groups", num_groups)
    check_positive_int("num_expert_groups", num_expert_groups)
    if top_k > num_experts:
        raise ValueError(f"top_k is {top_k}; expected at most num_experts = {num_experts}.")
    if num_tokens % num_groups:
        raise ValueError(
            f"num_groups {num_groups} does not divide the {num_tokens} tokens of router_logits; "
            "expected sequences of equal length."
        )
    _check_expert_groups(num_experts, top_k, num_expert_groups, top_k_groups)


def _capacity(
    tokens_per_group: int,
    num_experts: int,
    capacity_factor: float | None,
    capacity: int | None,
    rounding: str,
    multiple_of: int,
) -> int:
    if capacity is None:
        factor = 2.0 if capacity_factor is None else capacity_factor
        return expert_capacity(
            tokens_per_group, num_experts, factor, rounding=rounding, multiple_of=multiple_of
        )
    if capacity_factor is not None:
        raise ValueError(
            f"capacity is {capacity} and capacity_factor is {capacity_factor}; give only one."
        )
    if rounding != "floor" or multiple_of != 1:
        raise ValueError(
            f"capacity is {capacity}, so rounding {rounding!r} and multiple_of {multiple_of} have "
            "nothing to round; leave them at their defaults."
        )
    check_positive_int("capacity", capacity)
    if capacity > tokens_per_group:
        raise ValueError(
            f"capacity is {capacity}; expected at most the {tokens_per_group} tokens of a group."
        )
    return capacity


def _check_expert_groups(
    num_experts: int, top_k: int, num_expert_groups: int, top_k_groups: int
) -> None:
    check_positive_int("top_k_groups", top_k_groups)
    if num_experts % num_expert_groups:
        raise ValueError(
            f"num_expert_groups {num_expert_groups} does not divide num_experts {num_experts}."
        )
    if top_k_groups > num_expert_groups:
        raise ValueError(
            f"top_k_groups is {top_k_groups}; expected at most num_expert_groups = "
            f"{num_expert_groups}."
        )
    reachable = top_k_groups * (num_experts // num_expert_groups)
    if top_k > reachable:
        raise ValueError(
            f"top_k is {top_k}, but top_k_groups {top_k_groups} of {num_expert_groups} groups "
            f"leave {reachable} experts to choose from."
        )
