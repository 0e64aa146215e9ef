"""Dense to mixture-of-experts upcycling of existing models; see docs/upcycling.md."""

from moe_kernels.upcycling.convert import upcycle
from moe_kernels.upcycling.importance import measure_importance
from moe_kernels.upcycling.module import UpcycledMLP, collect_plans
from moe_kernels.upcycling.report import BlockReport, UpcycleReport

__all__ = [
    "BlockReport",
    "UpcycleReport",
    "UpcycledMLP",
    "collect_plans",
    "measure_importance",
    "upcycle",
]
