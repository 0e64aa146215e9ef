"""TransformerEngine: the fused router, and permute and unpermute over a (T, E) routing map.

Read from transformer_engine 2.20.2, ``pytorch/router.py`` and ``pytorch/permutation.py``.
"""

import torch
from torch import Tensor

from benchmarks.libraries.library import Library, Permute, Router, Unpermute
from moe_kernels import RoutingPlan


def router() -> Router:
    """Softmax over all experts, then top-k; the loss from its own two functions."""
    from transformer_engine.pytorch.router import (
        fused_compute_score_for_moe_aux_loss,
        fused_moe_aux_loss,
        fused_topk_with_score_function,
    )

    def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_tokens, num_experts = logits.shape
        experts = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
        probs, experts = fused_topk_with_score_function(
            logits,
            top_k,
            use_pre_softmax=True,
            num_groups=None,
            group_topk=None,
            scaling_factor=None,
            score_function="softmax",
            expert_bias=None,
            topk_indices=experts,
        )
        routing_map, scores = fused_compute_score_for_moe_aux_loss(logits, top_k, "softmax")
        counts = routing_map.sum(0, dtype=torch.int32)
        loss = fused_moe_aux_loss(scores, counts, num_tokens, num_experts, top_k, coeff=1.0)
        return probs.gather(1, experts), experts, counts, loss

    return route


def permute() -> Permute:
    """Rows in expert order, an expert's in the order of the tokens; its map is made in the call."""
    from transformer_engine.pytorch.permutation import moe_permute

    def rows_of(x: Tensor, routing_map: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        rows, row_id_map = moe_permute(x, routing_map, num_out_tokens=num_rows, map_type="mask")
        return rows, row_id_map

    return rows_of


def unpermute() -> Unpermute:
    """The weighted sum of each token's rows."""
    from transformer_engine.pytorch.permutation import moe_unpermute

    def tokens_of(
        rows: Tensor, row_id_map: Tensor, weights: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        out: Tensor = moe_unpermute(
            rows,
            row_id_map,
            merging_probs=weights,
            restore_shape=torch.Size(shape),
            map_type="mask",
        )
        return out

    return tokens_of


def places_of(plan: RoutingPlan) -> tuple[Tensor, Tensor]:
    """Token and expert of each row: where it stands in a (T, E) map."""
    tokens_per_expert = plan.expert_offsets.diff()
    numbers = torch.arange(plan.num_experts, device=tokens_per_expert.device)
    experts = numbers.repeat_interleave(tokens_per_expert, output_size=plan.num_rows)
    return plan.token_indices.long(), experts


def routing_map_of(plan: RoutingPlan) -> Tensor:
    """(T, E) One where a token has a row of the expert, otherwise zero."""
    size = (plan.num_tokens, plan.num_experts)
    routing_map = torch.zeros(size, dtype=torch.int32, device=plan.token_indices.device)
    routing_map[places_of(plan)] = 1
    return routing_map


def _load() -> None:
    router()
    permute()
    unpermute()


LIBRARY = Library(
    "TransformerEngine",
    "transformer_engine",
    "transformer_engine",
    load=_load,
    # Its PyTorch part is compiled against the torch that is there: a CUDA toolkit and cuDNN.
    install=('pip install --no-build-isolation "transformer_engine[core_cu13,pytorch]"',),
    stages=("token_choice", "dispatch", "combine"),
)
