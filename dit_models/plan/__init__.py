"""What a training run takes on many GPUs, worked out before it starts: memory, bytes, time."""

from dit_models.plan.memory import Memory, plan_memory
from dit_models.plan.mesh import Mesh, sensible_meshes
from dit_models.plan.settings import Cluster, Run
from dit_models.plan.times import Estimate, estimate, recommend
from dit_models.plan.traffic import Traffic, plan_traffic

__all__ = [
    "Cluster",
    "Estimate",
    "Memory",
    "Mesh",
    "Run",
    "Traffic",
    "estimate",
    "plan_memory",
    "plan_traffic",
    "recommend",
    "sensible_meshes",
]
