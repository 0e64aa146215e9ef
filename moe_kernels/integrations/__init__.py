"""The kernels in models that exist already: one adapter a family of blocks."""

from moe_kernels.integrations.adapter import Adapter
from moe_kernels.integrations.diffmoe import ECDiT
from moe_kernels.integrations.dit_moe import DiTMoE
from moe_kernels.integrations.hidream import HiDream
from moe_kernels.integrations.micro_diffusion import MicroDiffusion
from moe_kernels.integrations.nucleus import Nucleus
from moe_kernels.integrations.transformers_experts import TransformersExperts

# Tried in this order.
ADAPTERS: tuple[Adapter, ...] = (
    HiDream(),
    Nucleus(),
    DiTMoE(),
    ECDiT(),
    MicroDiffusion(),
    TransformersExperts(),
)
