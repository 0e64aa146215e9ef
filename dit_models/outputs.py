"""What every model of this package returns."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from moe_kernels import RoutingPlan


class DiTOutput(NamedTuple):
    """Prediction of a diffusion transformer.

    Attributes:
        sample: (B, C_out, H, W) prediction (velocity, or noise with an optional variance half).
        plans: one ``RoutingPlan`` for each MoE layer, first layer first; empty for a dense model.
        router_losses: the routers' own losses, unweighted scalars by name, summed over the layers.
        observed: for each MoE layer, the statistics that its router learns from after the step.
        layer_predictions: for each MoE layer with a layer head, its prediction of the training
            target, (B, tokens that the layer saw, C · p²) in patches.
    """

    sample: Tensor
    plans: tuple[RoutingPlan, ...]
    router_losses: Mapping[str, Tensor] = MappingProxyType({})
    observed: tuple[Mapping[str, Tensor], ...] = ()
    layer_predictions: tuple[Tensor, ...] = ()
