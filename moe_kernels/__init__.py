"""Mixture-of-experts routing kernels for diffusion transformers.

A layer is five stages: route, dispatch, expert MLP, combine, losses. The names below are in that
order.
"""

from moe_kernels.backends import BackendUnavailable, use_backend
from moe_kernels.cache import cache_folder
from moe_kernels.checkpoint import save_routing_context_fn
from moe_kernels.choices import plan_from_choices
from moe_kernels.combine import combine
from moe_kernels.dispatch import dispatch
from moe_kernels.expert_mlp import expert_mlp, grouped_gemm
from moe_kernels.integrations.hub_kernels import register_with_kernels
from moe_kernels.integrations.megablocks import from_megablocks, to_megablocks
from moe_kernels.integrations.report import (
    NothingMatched,
    SwapReport,
    SwapRow,
    VerificationFailed,
)
from moe_kernels.integrations.swap import apply, revert
from moe_kernels.integrations.transformers_experts import register_with_transformers
from moe_kernels.layers import (
    ExpertChoiceRouter,
    GroupedExperts,
    LinearRouter,
    MoE,
    SharedExpert,
    TokenChoiceRouter,
    num_pools,
)
from moe_kernels.losses import load_balance_loss, router_similarity_loss, router_z_loss
from moe_kernels.plan import RoutingPlan
from moe_kernels.router import expert_capacity, expert_choice, token_choice
from moe_kernels.selection import (
    expert_choice_per_group,
    pair_choice,
    plan_from_selection,
)
from moe_kernels.telemetry import RoutingStats, routing_stats
from moe_kernels.upcycling import (
    UpcycledMLP,
    UpcycleReport,
    collect_plans,
    measure_importance,
    upcycle,
)
from moe_kernels.warmup import WarmupReport, warmup

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "ExpertChoiceRouter",
    "GroupedExperts",
    "LinearRouter",
    "MoE",
    "NothingMatched",
    "RoutingPlan",
    "RoutingStats",
    "SharedExpert",
    "SwapReport",
    "SwapRow",
    "TokenChoiceRouter",
    "UpcycleReport",
    "UpcycledMLP",
    "VerificationFailed",
    "WarmupReport",
    "apply",
    "cache_folder",
    "collect_plans",
    "combine",
    "dispatch",
    "expert_capacity",
    "expert_choice",
    "expert_choice_per_group",
    "expert_mlp",
    "from_megablocks",
    "grouped_gemm",
    "load_balance_loss",
    "measure_importance",
    "num_pools",
    "pair_choice",
    "plan_from_choices",
    "plan_from_selection",
    "register_with_kernels",
    "register_with_transformers",
    "revert",
    "router_similarity_loss",
    "router_z_loss",
    "routing_stats",
    "save_routing_context_fn",
    "to_megablocks",
    "token_choice",
    "upcycle",
    "use_backend",
    "warmup",
]
