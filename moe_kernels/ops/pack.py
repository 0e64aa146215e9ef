"""The int32 results of a routing op in one buffer: nine allocations cost more than routing."""

from typing import NamedTuple

from torch import Tensor


class PlanIndices(NamedTuple):
    """The parts of the buffer, in its order; ``csrc/cpu/kernels.hpp`` (PlanLayout) has the same."""

    token_indices: Tensor  # (R,)
    row_indices: Tensor  # (R,)
    row_experts: Tensor  # (R,) the expert of each entry of row_indices
    row_offsets: Tensor  # (T + 1,)
    expert_offsets: Tensor  # (E + 1,)
    tokens_per_expert: Tensor  # (E,)
    histogram: Tensor  # (E + 1,) tokens that 0, 1, ..., E experts took
    group_counts: Tensor  # (G * E,) rows of each expert in each group
    expert_indices: Tensor  # (T * K,) token choice; (0,) expert choice


def packed_sizes(
    num_tokens: int, num_experts: int, num_groups: int, num_rows: int, top_k: int
) -> list[int]:
    """Lengths of the parts; ``top_k`` is 0 for expert choice."""
    return [
        *(num_rows, num_rows, num_rows, num_tokens + 1, num_experts + 1, num_experts),
        *(num_experts + 1, num_groups * num_experts, num_tokens * top_k),
    ]


def unpack(packed: Tensor, sizes: list[int]) -> PlanIndices:
    """Views of the parts."""
    return PlanIndices._make(packed.split_with_sizes(sizes))
