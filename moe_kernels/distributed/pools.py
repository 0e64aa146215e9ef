"""Routers whose pool is the batch: let them choose from the batch of all ranks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from moe_kernels.distributed.global_choice import (
    global_expert_choice,
    global_kth_largest,
    global_num_tokens,
    pair_choice_and_threshold,
)
from moe_kernels.distributed.groups import recall, remember
from moe_kernels.layers import LinearRouter
from moe_kernels.plan import RoutingPlan


class SharedPool(NamedTuple):
    """What a router does with the tokens of all ranks where it has one.

    ``torch.compile`` breaks its graph at each of the choices: they wait for the device.

    Attributes:
        group_name: name of the process group; a name survives copies of the model.
        equal_tokens: every rank has as many tokens, so that they need not be counted.
    """

    group_name: str
    equal_tokens: bool = False

    @property
    def process_group(self) -> distributed.ProcessGroup:
        """The ranks that share the pool."""
        return recall(self.group_name)

    @property
    def num_ranks(self) -> int:
        """Ranks that share the pool."""
        return distributed.get_world_size(self.process_group)

    @torch.compiler.disable
    def num_tokens(self, router_logits: Tensor) -> int:
        """T of all ranks; waits for the device unless all have as many tokens."""
        if self.equal_tokens:
            return router_logits.shape[0] * self.num_ranks
        return global_num_tokens(router_logits, self.process_group)

    @torch.compiler.disable
    def expert_choice(
        self, router_logits: Tensor, capacity_factor: float | None = None, **options: Any
    ) -> RoutingPlan:
        """``global_expert_choice``; ``num_tokens_global`` may be given where it is known."""
        if options.get("num_tokens_global") is None:
            options["num_tokens_global"] = self.num_tokens(router_logits)
        return global_expert_choice(
            router_logits, capacity_factor, process_group=self.process_group, **options
        )

    @torch.compiler.disable
    def pair_choice(
        self, router_logits: Tensor, num_rows: int, **options: Any
    ) -> tuple[RoutingPlan, Tensor]:
        """``global_pair_choice``, and the smallest winning affinity, a scalar."""
        return pair_choice_and_threshold(router_logits, num_rows, self.process_group, **options)

    @torch.compiler.disable
    def kth_largest(self, values: Tensor, k: int) -> Tensor:
        """``global_kth_largest``."""
        return global_kth_largest(values, k, process_group=self.process_group)


def share_pools(
    model: nn.Module,
    process_group: distributed.ProcessGroup | None,
    *,
    equal_tokens: bool = False,
) -> int:
    """Let the routers whose pool is the batch choose from the batches of all ranks in training.

    This concerns routers with ``pools_batch``: ``ExpertChoiceRouter(group="batch")`` and others in
    which all tokens of a batch compete. Per-image routers are left alone, and so are pools of a
    number of tokens: that number must divide a rank's tokens, and no pool spans two ranks.

    Only in training. In ``eval()`` a router chooses from the tokens that it is given, so that one
    rank alone can draw images or evaluate. Without this call each rank is a pool of its own, and
    results depend on the number of ranks. Nothing of it is in the ``state_dict``.

    Args:
        model: with ``LinearRouter`` s, sharded or not.
        process_group: the ranks whose batches make the pool, each token once; ``None`` makes each
            rank a pool of its own again.
        equal_tokens: every rank has as many tokens at every step (a wrong promise is found and
            raises). Otherwise each layer counts them with a message of its own.

    Returns:
        How many routers share their pool.
    """
    pool = None
    if process_group is not None:
        pool = SharedPool(remember(process_group), equal_tokens)
    routers = [
        module
        for module in model.modules()
        if isinstance(module, LinearRouter) and module.pools_batch
    ]
    for router in routers:
        router.shared_pool = pool
    return len(routers)
