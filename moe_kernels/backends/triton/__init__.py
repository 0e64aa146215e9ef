"""Triton kernels, one file a stage: NVIDIA from SM80 on, AMD, and the interpreter on a CPU."""

from moe_kernels.backends.stages import Stages
from moe_kernels.backends.triton import activation, experts, rows

# Importing these has given the ops their Triton kernels.
KERNELS = (activation, experts, rows)

IMPLEMENTATIONS = Stages("triton", has_fp64=False).implementations()
