"""The k best rows of all ranks, column by column, by a radix search for the k-th largest value.

Only histograms travel: for each 8 bits of the values one all-reduce of (columns, 256) counts, and
in the end one all-gather of how many rows of each rank equal the k-th largest value.
"""

import torch
from torch import Tensor, distributed

from moe_kernels.checkpoint import always_save
from moe_kernels.distributed.groups import all_gather, all_reduce, recall
from moe_kernels.ops.operator import Operator

_BINS = 256
_BITS = 8


def _search_fake(
    values: Tensor, header: Tensor, k: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(values, dtype=torch.bool, memory_format=torch.contiguous_format),
        values.new_empty(values.shape[1]),
        header.new_empty(distributed.get_world_size(recall(group)), header.shape[0]),
    )


def _search_kernel(
    values: Tensor, header: Tensor, k: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    process_group = recall(group)
    codes = _sortable(values)
    columns = codes.shape[1]
    width = torch.iinfo(codes.dtype).bits
    need = torch.full((columns,), k, dtype=torch.int32, device=codes.device)
    threshold = torch.zeros(columns, dtype=codes.dtype, device=codes.device)
    candidates = torch.ones_like(codes, dtype=torch.bool)
    for shift in range(width - _BITS, -1, -_BITS):
        digits = (codes >> shift) & (_BINS - 1)
        if shift == width - _BITS:
            digits = digits ^ (_BINS // 2)  # of signed numbers the negative come first
        counts = all_reduce("search histogram", _histogram(digits, candidates), process_group)
        from_above = counts.flip(1).cumsum(1, dtype=torch.int32)  # rows in the bins from 255 down
        # The first place where enough rows are reached; fewer rows than k end in bin 0.
        place = (from_above < need.unsqueeze(1)).sum(1, keepdim=True).clamp(max=_BINS - 1)
        above = torch.where(place > 0, from_above.gather(1, (place - 1).clamp(min=0)), 0)
        need = need - above.squeeze(1)
        digit = (_BINS - 1 - place.squeeze(1)).to(codes.dtype)
        candidates &= digits == digit
        if shift == width - _BITS:
            digit = digit ^ (_BINS // 2)
        threshold |= digit << shift
    # Of what equals the threshold the first ``need`` are taken, in rank order.
    joined = torch.cat([candidates.sum(0, dtype=torch.int32), header])
    ties, headers = all_gather("search ties", joined, process_group).split(
        [columns, header.shape[0]], dim=1
    )
    before = ties[: distributed.get_rank(process_group)].sum(0, dtype=torch.int32)
    place = candidates.cumsum(0, dtype=torch.int32) + before  # from 1
    chosen = (codes > threshold) | (candidates & (place <= need))
    return chosen, _value(threshold, values), headers.contiguous()


def _sortable(values: Tensor) -> Tensor:
    """Signed integers in the order of the values; NaN is -inf, and -0.0 is 0.0."""
    values = torch.where(torch.isnan(values), float("-inf"), values)
    values = torch.where(values == 0, 0.0, values).contiguous()
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _value(codes: Tensor, like: Tensor) -> Tensor:
    """What ``_sortable`` made of the values, undone."""
    bits = torch.where(codes < 0, codes ^ torch.iinfo(codes.dtype).max, codes)
    return bits.view(like.dtype)


def _histogram(digits: Tensor, candidates: Tensor) -> Tensor:
    """(columns, 256) int32, how often each digit occurs among the candidates."""
    columns = digits.shape[1]
    offsets = torch.arange(columns, device=digits.device) * _BINS
    counts = torch.zeros(columns * _BINS, dtype=torch.int32, device=digits.device)
    places = (digits + offsets).flatten()
    counts.scatter_add_(0, places, candidates.flatten().to(torch.int32))
    return counts.view(columns, _BINS)


_global_search = Operator(
    "global_search(Tensor values, Tensor header, SymInt k, str group) -> (Tensor, Tensor, Tensor)",
    _search_fake,
)
_global_search.implement("ranks", _search_kernel, ("cpu", "cuda"))

_rank_sum = Operator(
    "rank_sum(Tensor counts, str group) -> Tensor", lambda counts, group: torch.empty_like(counts)
)
_rank_sum.implement(
    "ranks",
    lambda counts, group: all_reduce("count", counts.clone(), recall(group)),
    ("cpu", "cuda"),
)
# A recomputed forward must neither talk to other ranks again nor choose otherwise.
always_save(_global_search, _rank_sum)


def global_search(
    values: Tensor, k: int, group: str, header: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest values of each column over the rows of all ranks, without gradient.

    Equal values: the rows of lower ranks first, inside a rank the lower row; NaN ranks with -inf.
    Nothing is asked of the device.

    Args:
        values: (N, M) fp32 or fp64; N may differ from rank to rank and be 0.
        k: from 0 to the number of rows of all ranks, the same on every rank.
        group: name of the process group (``groups.remember``).
        header: (H,) int32, numbers that travel along.

    Returns:
        (N, M) bool, which values of this rank are among the k; (M,) the k-th largest value;
        (ranks, H) the headers.
    """
    return _global_search["ranks"](values.detach(), header, k, group)


def count_over_ranks(number: int, device: torch.device, group: str) -> int:
    """The sum over ranks of a number on the host; waits for the device."""
    counts = torch.full((1,), number, dtype=torch.int64, device=device)
    return int(_rank_sum["ranks"](counts, group))
