"""Triton kernels, one file a stage: NVIDIA from SM80 on, AMD, and the interpreter on a CPU."""

from moe_kernels.backends.stages import Stages

IMPLEMENTATIONS = Stages("triton", has_fp64=False).implementations()
