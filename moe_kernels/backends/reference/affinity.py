"""Affinities and the helpers that both routers share."""

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_affinity(router_logits: Tensor, affinity: str) -> Tensor:
    """(T, E) affinities: softmax over experts, sigmoid, or the logits themselves."""
    if affinity == "softmax":
        return torch.softmax(router_logits, dim=-1)
    if affinity == "sigmoid":
        return torch.sigmoid(router_logits)
    assert affinity == "identity", affinity
    return router_logits


def ranking_key(affinity: Tensor) -> Tensor:
    """What selection compares: no gradient, and NaN ranks with -inf so that it is chosen last."""
    key = affinity.detach()
    return torch.where(torch.isnan(key), float("-inf"), key)


def divide_by_sum(weights: Tensor, sums: Tensor) -> Tensor:
    """weights / sums, with 0 / 0 = 0 (gradient 0) when every affinity of a token underflowed."""
    return weights / torch.where(sums > 0, sums, 1.0)


def invert_rows(token_indices: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """CSR of the rows of each token: row_indices (R,) and row_offsets (T + 1,), int32."""
    row_indices = torch.argsort(token_indices, stable=True).int()
    counts = torch.zeros(num_tokens, dtype=torch.int32, device=token_indices.device)
    counts = counts.index_add(0, token_indices, torch.ones_like(token_indices))
    return row_indices, exclusive_offsets(counts)


def exclusive_offsets(counts: Tensor) -> Tensor:
    """(n + 1,) int32 exclusive prefix sums of (n,) counts."""
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
