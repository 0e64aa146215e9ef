"""Mixture-of-experts routing kernels for diffusion transformers.

A layer is five stages: route, dispatch, expert MLP, combine, losses. The names below are in that
order.
"""

from moe_kernels.backends import BackendUnavailable, use_backend
from moe_kernels.cache import cache_folder
from moe_kernels.checkpoint import save_routing_context_fn
from moe_kernels.combine import combine
from moe_kernels.dispatch import dispatch
from moe_kernels.expert_mlp import expert_mlp, grouped_gemm
from moe_kernels.layers import (
    ExpertChoiceRouter,
    GroupedExperts,
    MoE,
    SharedExpert,
    TokenChoiceRouter,
)
from moe_kernels.losses import load_balance_loss, router_similarity_loss, router_z_loss
from moe_kernels.plan import RoutingPlan
from moe_kernels.router import expert_capacity, expert_choice, token_choice
from moe_kernels.telemetry import RoutingStats, routing_stats
from moe_kernels.warmup import WarmupReport, warmup

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "ExpertChoiceRouter",
    "GroupedExperts",
    "MoE",
    "RoutingPlan",
    "RoutingStats",
    "SharedExpert",
    "TokenChoiceRouter",
    "WarmupReport",
    "cache_folder",
    "combine",
    "dispatch",
    "expert_capacity",
    "expert_choice",
    "expert_mlp",
    "grouped_gemm",
    "load_balance_loss",
    "router_similarity_loss",
    "router_z_loss",
    "routing_stats",
    "save_routing_context_fn",
    "token_choice",
    "use_backend",
    "warmup",
]
