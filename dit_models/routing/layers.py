"""All routers of a model together: what their layers returned, what they learn between steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

import moe_kernels as mk
from dit_models.routing.base import LayerRouting, Router


def joined(routings: Sequence[LayerRouting]) -> dict[str, Any]:
    """The fields of ``DiTOutput`` that come from its MoE layers."""
    losses: dict[str, Tensor] = {}
    for routing in routings:
        for name, value in routing.losses.items():
            losses[name] = losses[name] + value if name in losses else value
    predictions = (routing.prediction for routing in routings)
    return {
        "plans": tuple(routing.plan for routing in routings),
        "router_losses": losses,
        "observed": tuple(routing.observed for routing in routings),
        "layer_predictions": tuple(each for each in predictions if each is not None),
    }


def routers_of(model: nn.Module) -> list[nn.Module]:
    """The routers of a model's MoE layers, first layer first."""
    return [module.router for module in model.modules() if isinstance(module, mk.MoE)]


def set_progress(model: nn.Module, progress: float) -> None:
    """Tell every router the share of training that is done, from 0 to 1, on the host."""
    for router in routers_of(model):
        if isinstance(router, Router):
            router.set_progress(progress)


@torch.no_grad()
def average_observed(
    micro_batches: Sequence[Sequence[Mapping[str, Tensor]]],
    process_group: distributed.ProcessGroup,
) -> tuple[dict[str, Tensor], ...]:
    """What all ranks observed in a step: the mean over ranks and micro-batches, in one message.

    Args:
        micro_batches: ``DiTOutput.observed`` of each micro-batch of the step on this rank, of
            equal size on every rank.
        process_group: the ranks that share the batch.

    Returns:
        For each layer the means, in fp64, the same on every rank: one micro-batch of
        ``update_routers``.
    """
    from moe_kernels import distributed as ranks

    # In fp64, so that the mean of equal values is that value.
    means = [
        {name: torch.stack([each[name].double() for each in seen]).mean(0) for name in seen[0]}
        for seen in zip(*micro_batches, strict=True)
    ]
    sums = iter(ranks.sum_over_ranks([v for mean in means for v in mean.values()], process_group))
    size = distributed.get_world_size(process_group)
    return tuple({name: next(sums) / size for name in mean} for mean in means)


@torch.no_grad()
def update_routers(
    model: nn.Module, micro_batches: Sequence[Sequence[Mapping[str, Tensor]]]
) -> None:
    """Let every router learn from what a step observed.

    Args:
        model: the trained model.
        micro_batches: ``DiTOutput.observed`` of each micro-batch of the step; their mean is taken.
    """
    for layer, router in enumerate(routers_of(model)):
        seen = [observed[layer] for observed in micro_batches]
        if seen and seen[0]:
            assert isinstance(router, Router)
            names = seen[0]
            router.update({name: torch.stack([s[name] for s in seen]).mean(0) for name in names})
