"""What DeepEP's documentation says of ``deep_ep.Buffer``, on objects sent through gloo."""

from typing import Any

import torch
from torch import Tensor, distributed


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Event:
    def __init__(self, events: list[str]) -> None:
        self.events = events

    def current_stream_wait(self) -> None:
        self.events.append("wait")


def everyone(value: Any, group: distributed.ProcessGroup) -> list[Any]:
    gathered = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(gathered, value, group)
    return gathered


class Buffer:
    """Sends each token once to every rank that has an expert of it; sums what comes back."""

    events: list[str] = []  # noqa: RUF012
    made: list[int] = []  # noqa: RUF012

    def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group = group
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.made.append(num_nvl_bytes)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config()

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config()

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == torch.int64
        size = distributed.get_world_size(self.group)
        owners = topk_idx // (num_experts // size)
        is_in_rank = (owners[:, :, None] == torch.arange(size)).any(1)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts).int()
        return is_in_rank.sum(0).int(), None, per_expert, is_in_rank, None

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        async_finish: bool = False,
    ) -> tuple[Any, ...]:
        self.events.append("dispatch")
        me = distributed.get_rank(self.group)
        if handle is not None:
            sent = everyone(x, self.group)
            rows = [s[is_in[:, me]] for s, is_in in zip(sent, handle, strict=True)]
            return torch.cat(rows), None, None, None, None, Event(self.events)
        assert async_finish
        assert num_tokens_per_expert is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        sent = everyone((x, topk_idx, topk_weights, is_token_in_rank), self.group)
        rows, choices, weights = (
            torch.cat([part[i][part[3][:, me]] for part in sent]) for i in range(3)
        )
        each = num_tokens_per_expert.numel() // distributed.get_world_size(self.group)
        choices = choices - me * each
        outside = (choices < 0) | (choices >= each)
        choices[outside] = -1
        weights[outside] = 0
        counts = torch.bincount(choices[~outside], minlength=each).tolist()
        masks = [part[3] for part in sent]
        return rows, choices, weights, counts, masks, Event(self.events)

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Event]:
        self.events.append("combine")
        me = distributed.get_rank(self.group)
        sums: list[Tensor | None] = []
        for values in (x, topk_weights):
            if values is None:
                sums.append(None)
                continue
            total = values.new_zeros(handle[me].shape[0], values.shape[1])
            for rank, theirs in enumerate(everyone(values, self.group)):
                counts = [int(is_in[:, rank].sum()) for is_in in handle]
                total[handle[me][:, rank]] += theirs.split(counts)[me]
            sums.append(total)
        assert sums[0] is not None
        return sums[0], sums[1], Event(self.events)
