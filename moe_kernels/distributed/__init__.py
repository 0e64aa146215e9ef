"""Expert parallelism, pools and statistics over the processes of ``torch.distributed``."""

from moe_kernels.distributed.debug import (
    DistributedMismatch,
    check_collective,
    debug_collectives,
)
from moe_kernels.distributed.expert_parallel import shard_experts
from moe_kernels.distributed.global_choice import (
    global_expert_choice,
    global_kth_largest,
    global_num_tokens,
    global_pair_choice,
)
from moe_kernels.distributed.groups import sum_over_ranks
from moe_kernels.distributed.pools import SharedPool, share_pools
from moe_kernels.distributed.statistics import (
    GlobalCounts,
    global_counts,
    global_load_balance_loss,
    global_router_similarity_loss,
    global_router_z_loss,
    global_routing_stats,
    global_tokens_per_expert,
)

__all__ = [
    "DistributedMismatch",
    "GlobalCounts",
    "SharedPool",
    "check_collective",
    "debug_collectives",
    "global_counts",
    "global_expert_choice",
    "global_kth_largest",
    "global_load_balance_loss",
    "global_num_tokens",
    "global_pair_choice",
    "global_router_similarity_loss",
    "global_router_z_loss",
    "global_routing_stats",
    "global_tokens_per_expert",
    "shard_experts",
    "share_pools",
    "sum_over_ranks",
]
