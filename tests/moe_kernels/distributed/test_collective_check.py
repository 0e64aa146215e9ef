"""The debug mode: every way in which ranks can disagree is an error on all of them, with names."""

import importlib.util

import pytest
import torch
from torch import distributed

import moe_kernels as mk
from moe_kernels.distributed import (
    DistributedMismatch,
    check_collective,
    debug,
    debug_collectives,
    shard_experts,
)
from tests.ranks import run_ranks

from .parallel_layers import HIDDEN, SEQ, expert_mesh, make_layer, numbers, relative


def disagree(case: str) -> str:
    rank = distributed.get_rank()
    name, dtype, width = "rows to experts", torch.float32, 16
    sends, receives = [1, 2, 3], [1 + rank] * 3
    if case == "width" and rank == 1:
        width = 17
    elif case == "dtype" and rank == 2:
        dtype = torch.bfloat16
    elif case == "order" and rank == 0:
        name = "row counts"
    elif case == "sizes" and rank == 2:
        receives = [3, 4, 3]
    try:
        with debug_collectives():
            assert distributed.group.WORLD is not None
            if case == "number" and rank == 1:
                debug._checked[distributed.group.WORLD.group_name] = 7
            if case == "kind":
                whole = (sends, receives) if rank else (None, None)
                check_collective(name, None, dtype, width, *whole)
            else:
                check_collective(name, None, dtype, width, sends, receives)
    except DistributedMismatch as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("none", []),
        ("width", ["differ in width", "rank 1: 'rows to experts' (number 0)", "width 17"]),
        ("dtype", ["differ in dtype", "rank 2: 'rows to experts' (number 0) of torch.bfloat16"]),
        ("order", ["differ in order", "rank 0: 'row counts'", "rank 1: 'rows to experts'"]),
        ("number", ["differ in number", "rank 1: 'rows to experts' (number 7)"]),
        ("kind", ["differ in kind", "rank 1"]),
        ("sizes", ["rank 1 sends 3 rows to rank 2, which expects 4"]),
    ],
)
def test_every_rank_names_what_differs(case: str, words: list[str]) -> None:
    said = run_ranks(disagree, 3, case)
    assert len(set(said)) == 1
    assert bool(said[0]) == bool(words)
    for word in words:
        assert word in said[0]


def layers_disagree(case: str) -> tuple[str, float]:
    """What is said when real layers disagree, and the error of a step that follows."""
    mk.use_backend("cpu,reference")
    rank = distributed.get_rank()
    layer, single = make_layer("expert_choice"), make_layer("expert_choice")
    other = make_layer("token_choice")
    for each in (layer, other):
        shard_experts(each, expert_mesh())
    said = ""
    with debug_collectives():
        try:
            if case == "uneven batches":
                layer(numbers(1 + rank, SEQ, HIDDEN, seed=rank))
            elif case == "order":
                (layer if rank else other)(numbers(2, SEQ, HIDDEN, seed=rank))
            else:
                two = [make_layer("expert_choice"), make_layer("expert_choice").float()]
                for each in two:
                    shard_experts(each, expert_mesh())
                mine = two[rank]
                mine(numbers(2, SEQ, HIDDEN, seed=rank).to(mine.router.weight.dtype))
        except DistributedMismatch as error:
            said = str(error)
        x = numbers(2, SEQ, HIDDEN, seed=rank).requires_grad_()
        out = layer(x)[0]
        out.backward(numbers(2, SEQ, HIDDEN, seed=9))
        return said, relative(out, single(x.detach())[0])


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("uneven batches", "rank 1 sends 8 rows to rank 0, which expects 4"),
        ("order", "differ in order"),
        ("dtype", "differ in dtype"),
    ],
)
def test_layers_that_disagree(case: str, words: str) -> None:
    for said, error in run_ranks(layers_disagree, 2, case):
        assert words in said
        assert error < 1e-12


def other_groups() -> str:
    """Each pair of ranks counts its own collectives; ranks are named by their global number."""
    rank = distributed.get_rank()
    pairs = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    with debug_collectives():
        for _ in range(1 + rank // 2):
            check_collective("sums", pairs[rank // 2], torch.float32, 4)
        check_collective("sums", None, torch.float32, 4)
        try:
            check_collective("sums", pairs[rank // 2], torch.float32, 4 + rank // 3)
        except DistributedMismatch as error:
            return str(error)
    return ""


def test_groups_are_apart() -> None:
    said = run_ranks(other_groups, 4)
    assert said[:2] == ["", ""]
    assert "rank 3: 'sums' (number 2) of torch.float32, width 5" in said[2]
    assert said[2] == said[3]


def costs_nothing() -> int:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was sent")

    distributed.barrier()
    distributed.all_gather = refuse
    for rank_dependent in range(distributed.get_rank() + 1):
        check_collective("sums", None, torch.float32, rank_dependent)
    with debug_collectives(False):
        check_collective("sums", None, torch.float32, 1)
    return len(debug._checked)


def test_off_by_default() -> None:
    assert run_ranks(costs_nothing, 2) == [0, 0]


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False)])
def test_environment_turns_it_on(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    monkeypatch.setenv(debug.VARIABLE, value)
    spec = importlib.util.spec_from_file_location("debug_anew", debug.__file__)
    assert spec is not None
    assert spec.loader is not None
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    assert anew.is_debugging() is expected


def test_a_context_puts_back_what_was() -> None:
    with debug_collectives():
        with debug_collectives(False):
            assert not debug.is_debugging()
        assert debug.is_debugging()
    assert not debug.is_debugging()
