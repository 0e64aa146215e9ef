"""CUDA C++ kernels (``csrc/cuda``): routing in one launch, dispatch and combine.

Matrix products, activations and the similarity loss stay with Triton.
"""

from moe_kernels.backends.cuda import route, rows
from moe_kernels.backends.cuda.native import MOST_EXPERTS, describe
from moe_kernels.backends.stages import Stages

# Importing these has given the ops their CUDA kernels.
KERNELS = (route, rows)

_STAGES = Stages("cuda", has_fp64=False, largest_experts=MOST_EXPERTS)

IMPLEMENTATIONS = {
    name: function
    for name, function in _STAGES.implementations().items()
    if name not in ("grouped_gemm", "expert_mlp", "activation", "router_similarity_loss")
}

__all__ = ["IMPLEMENTATIONS", "KERNELS", "describe"]
