"""What the routers add to the training loss: pure functions of a model's output."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed

import moe_kernels as mk
from dit_models.config import RouterLossConfig
from dit_models.embeddings import patchify
from dit_models.masking import gather_tokens
from dit_models.model_config import ModelConfig
from dit_models.outputs import DiTOutput


def router_losses(
    output: DiTOutput,
    weights: RouterLossConfig,
    counts: Sequence[Tensor] | None = None,
    own: Mapping[str, float] | None = None,
    head_losses: Sequence[Tensor] = (),
    process_group: distributed.ProcessGroup | None = None,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The router losses of a batch.

    Args:
        output: of the model.
        weights: coefficients of the losses of plans; what has the coefficient 0 is not computed.
        counts: for the balance loss, rows of each expert (E,) for each layer over a pool that is
            larger than this batch (with a ``process_group``: of all its ranks already, see
            ``moe_kernels.distributed.global_tokens_per_expert``); ``None`` counts this batch.
        own: coefficients of the routing's own losses, from ``own_coefficients``.
        head_losses: of ``layer_head_losses``.
        process_group: the ranks that share a batch. The losses of plans are then those of the
            batch of all ranks (in one message), so scaled that the mean over ranks of what is
            returned is the loss in one process, gradients included. Losses by sequence, the
            routing's own and those of heads are means over images, and so need as many images on
            every rank for that; where a sequence is the pool of the whole batch (group="batch",
            DiffMoE), the loss by sequence is that of each rank's part of it.

    Returns:
        Each loss without its coefficient, summed over the layers, for the log; and each with its
        coefficient, to be added to what is minimised.
    """
    plans = output.plans
    losses: dict[str, Tensor] = {}
    terms: list[Tensor] = []

    def add(name: str, coefficient: float, values: Sequence[Tensor]) -> None:
        losses[f"{name}_loss"] = torch.stack(list(values)).sum()
        terms.append(coefficient * losses[f"{name}_loss"])

    if plans:
        for name, values in _plan_losses(plans, weights, counts, process_group).items():
            add(name, getattr(weights, name), values)
    for name, coefficient in (own or {}).items():
        if coefficient and name in output.router_losses:
            add(name, coefficient, [output.router_losses[name]])
        elif coefficient and name == "layer_head" and head_losses:
            add(name, coefficient, head_losses)
    return losses, terms


def _plan_losses(
    plans: Sequence[mk.RoutingPlan],
    weights: RouterLossConfig,
    counts: Sequence[Tensor] | None,
    process_group: distributed.ProcessGroup | None,
) -> dict[str, list[Tensor]]:
    """The losses of plans that have a coefficient: a scalar for each layer, by name."""
    if process_group is not None:
        return _plan_losses_of_all_ranks(plans, weights, counts, process_group)
    losses = {}
    if weights.balance:
        losses["balance"] = _balance(plans, weights.balance_pool, counts)
    if weights.z:
        losses["z"] = [mk.router_z_loss(plan) for plan in plans]
    if weights.similarity:
        losses["similarity"] = [mk.router_similarity_loss(plan) for plan in plans]
    return losses


def _plan_losses_of_all_ranks(
    plans: Sequence[mk.RoutingPlan],
    weights: RouterLossConfig,
    counts: Sequence[Tensor] | None,
    process_group: distributed.ProcessGroup,
) -> dict[str, list[Tensor]]:
    from moe_kernels import distributed as ranks

    losses: dict[str, list[Tensor]] = {}
    by_sequence = weights.balance and weights.balance_pool == "sequence"
    if by_sequence:
        losses["balance"] = _balance(plans, "sequence", None)
    if not (weights.z or weights.similarity or (weights.balance and not by_sequence)):
        return losses
    seen = ranks.global_counts(plans, process_group, chosen_together=bool(weights.similarity))
    if weights.balance and not by_sequence:
        losses["balance"] = ranks.global_load_balance_loss(
            plans, process_group, tokens_per_expert=counts, counts=seen
        )
    if weights.z:
        losses["z"] = ranks.global_router_z_loss(plans, process_group, counts=seen)
    if weights.similarity:
        losses["similarity"] = ranks.global_router_similarity_loss(
            plans, process_group, counts=seen
        )
    return losses


def _balance(
    plans: Sequence[mk.RoutingPlan], pool: str, counts: Sequence[Tensor] | None
) -> list[Tensor]:
    return [
        mk.load_balance_loss(
            plan,
            per_sequence=pool == "sequence",
            tokens_per_expert=None if counts is None else counts[layer],
        )
        for layer, plan in enumerate(plans)
    ]


def layer_head_losses(
    output: DiTOutput, target: Tensor, patch_size: int, kept_tokens: Tensor | None = None
) -> list[Tensor]:
    """Mean squared error of each layer head's prediction of the training target.

    Args:
        output: of the model.
        target: (B, C, H, W) what the model learns to predict.
        patch_size: p.
        kept_tokens: (B, K) the tokens of masked training; only they count.

    Returns:
        A scalar for each MoE layer that has a head.

    Source: per-layer regularisation of Expert Race (arXiv 2503.16057).
    """
    if not output.layer_predictions:
        return []
    patches = patchify(target, patch_size)  # (B, S, C·p²)
    seq_len = patches.shape[1]
    if kept_tokens is not None:
        patches = gather_tokens(patches, kept_tokens)
    losses = []
    for prediction in output.layer_predictions:
        saw_all = prediction.shape[1] == seq_len
        if kept_tokens is not None and saw_all:
            prediction = gather_tokens(prediction, kept_tokens)
        losses.append((prediction.to(patches.dtype) - patches).square().mean())
    return losses


def own_coefficients(weights: RouterLossConfig, model: ModelConfig) -> dict[str, float]:
    """Coefficients of the losses that the model's routing has beside those of plans.

    Raises:
        ValueError: a coefficient for a loss that this routing, with its options, does not have.
    """
    known: dict[str, float] = {}
    if model.family != "dit":
        known = dict(model.routing_idea.own_losses(model.own_routing_options))
    if unknown := sorted(set(weights.own) - set(known)):
        listed = ", ".join(known) or "none"
        raise ValueError(
            f"router_loss.own has {', '.join(unknown)}, which the model's routing does not have; "
            f"it has {listed}."
        )
    return known | dict(weights.own)


def check_accumulation(accumulate: int, model: ModelConfig) -> None:
    """Refuse micro-batches for a routing in which the images of a batch compete.

    Raises:
        ValueError: accumulation would not equal the large batch.
    """
    if accumulate > 1 and model.family != "dit" and model.routing_idea.pools_images(model):
        raise ValueError(
            f"accumulate={accumulate} with routing {model.routing_idea.name!r}, in which images of "
            "a batch compete: images of different micro-batches would not share a pool, so "
            "accumulation would not equal the large batch. Set accumulate=1."
        )


def routing_telemetry(
    plans: Sequence[mk.RoutingPlan], process_group: distributed.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Statistics of every MoE layer (first index), for the log.

    ``router_entropy`` and ``unrouted_fraction`` (layers,); ``expert_load`` and ``mean_prob``
    (layers, E), shares of rows and mean probabilities; ``experts_per_token`` (layers, E + 1), the
    share of tokens that 0, 1, ..., E experts took. With a ``process_group`` they are those of the
    tokens of all its ranks, the same on each.
    """
    if process_group is None:
        stats = [plan.stats for plan in plans]
    else:
        from moe_kernels import distributed as ranks

        stats = ranks.global_routing_stats(plans, process_group)
    load = torch.stack([each.tokens_per_expert.float() for each in stats])
    histogram = torch.stack([each.experts_per_token_histogram.float() for each in stats])
    return {
        "router_entropy": torch.stack([each.entropy for each in stats]),
        "unrouted_fraction": torch.stack([each.unrouted_fraction for each in stats]),
        "expert_load": load / load.sum(1, keepdim=True).clamp_min(1),
        "mean_prob": torch.stack([each.mean_prob for each in stats]),
        "experts_per_token": histogram / histogram.sum(1, keepdim=True),
    }
