"""Triton kernels, one file a stage: NVIDIA from SM80 on, AMD, and the interpreter on a CPU."""

from moe_kernels.backends.stages import Stages
from moe_kernels.backends.triton import (
    activation,
    affinity,
    expert_choice,
    experts,
    route_bwd,
    rows,
    similarity,
    token_choice,
)

# Importing these has given the ops their Triton kernels.
KERNELS = (
    activation,
    affinity,
    expert_choice,
    experts,
    route_bwd,
    rows,
    similarity,
    token_choice,
)

IMPLEMENTATIONS = Stages("triton", has_fp64=False).implementations()
