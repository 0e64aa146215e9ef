"""What every model of this package returns."""

from typing import NamedTuple

from torch import Tensor

from moe_kernels import RoutingPlan


class DiTOutput(NamedTuple):
    """Prediction of a diffusion transformer.

    Attributes:
        sample: (B, C_out, H, W) prediction (velocity, or noise with an optional variance half).
        plans: one ``RoutingPlan`` for each MoE layer, first layer first; empty for a dense model.
    """

    sample: Tensor
    plans: tuple[RoutingPlan, ...]
