"""Parameters that are put next to each other in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_kernels.integrations.packing import pack, seen_alone, unpack
from moe_kernels.ops.parts import are_adjacent

from .parity import backend

__all__ = ["backend"]


def parameters(count: int = 3, *shape: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    return [nn.Parameter(torch.randn(*(shape or (4, 5))).to(dtype)) for _ in range(count)]


# What is adjacent.


def rows() -> Tensor:
    return torch.arange(60.0).view(3, 4, 5)


ADJACENT = {
    "in order": lambda: list(rows()),
    "behind others": lambda: list(torch.arange(80.0).view(4, 4, 5)[1:]),
    "one": lambda: [torch.zeros(4, 5)],
    "vectors": lambda: list(torch.zeros(3, 7)),
    "bf16": lambda: list(rows().bfloat16()),
    "one column": lambda: list(torch.zeros(3, 4, 1)),
    "without elements": lambda: list(torch.zeros(3, 0, 5)),
}
APART = {
    "own memory": lambda: [part.clone() for part in rows()],
    "reversed": lambda: list(rows())[::-1],
    "with gaps": lambda: list(torch.arange(120.0).view(6, 4, 5)[::2]),
    "overlapping": lambda: [torch.arange(60.0)[i * 10 : i * 10 + 20].view(4, 5) for i in (0, 1, 2)],
    "the same": lambda: [rows()[0]] * 3,
    "transposed": lambda: [part.t() for part in torch.arange(60.0).view(3, 5, 4)],
    "interleaved": lambda: list(torch.arange(60.0).view(4, 3, 5).unbind(1)),
    "spread": lambda: [part.expand(4, 5) for part in torch.arange(15.0).view(3, 1, 5)],
    # Addresses follow each other, but the memory belongs to three tensors: no view of one of them
    # may reach into the next.
    "neighbours by chance": lambda: [torch.from_dlpack(part) for part in rows()],
    "the last one elsewhere": lambda: [*list(rows())[:2], torch.zeros(4, 5)],
}


@pytest.mark.parametrize("make", ADJACENT.values(), ids=ADJACENT)
def test_adjacent(make):
    assert are_adjacent(make())


@pytest.mark.parametrize("make", APART.values(), ids=APART)
def test_apart(make):
    assert not are_adjacent(make())


# Packing.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parameters_stay_the_objects_that_they_are(dtype):
    parts = parameters(dtype=dtype)
    parts[1].requires_grad_(False)
    parts[2].grad = torch.ones_like(parts[2])
    values = [part.detach().clone() for part in parts]
    held = list(parts)
    assert pack(parts) is None
    assert are_adjacent(parts)
    for part, before, value in zip(parts, held, values, strict=True):
        assert part is before
        assert torch.equal(part, value)
        assert part.is_leaf
        assert type(part) is nn.Parameter
    assert [part.requires_grad for part in parts] == [True, False, True]
    assert torch.equal(parts[2].grad, torch.ones(4, 5, dtype=dtype))
    addresses = [part.data_ptr() for part in parts]
    assert pack(parts) is None
    assert [part.data_ptr() for part in parts] == addresses


def test_unpacking():
    parts = parameters()
    values = [part.detach().clone() for part in parts]
    pack(parts)
    unpack(parts)
    assert not are_adjacent(parts)
    for part, value in zip(parts, values, strict=True):
        assert torch.equal(part, value)
        assert part.untyped_storage().nbytes() == part.nbytes
    addresses = [part.data_ptr() for part in parts]
    unpack(parts)
    assert [part.data_ptr() for part in parts] == addresses


def test_a_part_seen_alone_is_the_same_memory():
    parts = parameters()
    pack(parts)
    alone = seen_alone(parts[1].detach())
    assert alone.untyped_storage().nbytes() == parts[1].nbytes
    alone.fill_(7)
    assert (parts[1] == 7).all()
    assert seen_alone(alone) is alone
    assert seen_alone(parts[1]) is parts[1]  # a leaf stays itself


class Marked(torch.Tensor):
    pass


def in_inference_mode() -> list[Any]:
    with torch.inference_mode():
        return parameters()


def of_a_flat_buffer() -> list[Any]:
    """As optimisers that shard, and FSDP1, keep the weights."""
    flat = torch.randn(100)
    return [nn.Parameter(flat[start : start + 20].view(4, 5)) for start in (0, 30, 70)]


def shared() -> list[Any]:
    parts = parameters()
    for part in parts:
        part.share_memory_()
    return parts


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: [*parameters(2), *parameters(1, 4, 6)], "shapes (4, 5) and (4, 6)"),
        (lambda: [*parameters(2), *parameters(1, dtype=torch.float16)], "dtype or device"),
        (lambda: [*parameters(2), nn.Parameter(torch.zeros(4, 5).as_subclass(Marked))], "Marked"),
        (lambda: [part.to("meta") for part in nn.ParameterList(parameters()).to("meta")], "meta"),
        (in_inference_mode, "inference mode"),
        (of_a_flat_buffer, "larger buffer of somebody else"),
        (shared, "shared with other processes"),
        (lambda: [(part := parameters(1)[0]), part], "experts share a weight"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_what_stays_apart(make, reason):
    parts = make()
    before = [(id(part), part.data_ptr()) for part in parts if not part.is_meta]
    assert reason in pack(parts)
    assert [(id(part), part.data_ptr()) for part in parts if not part.is_meta] == before
