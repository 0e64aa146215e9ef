"""EC-DiT's block of the DiffMoE and ProMoE repositories on the kernels."""

import pytest
import torch
from torch import nn

import moe_kernels as mk

from ...models import diffmoe_batch
from ...models.diffmoe import SparseMoEBlock
from .blocks import assert_parity
from .contract import Compiled, Lifecycle, Numbers
from .parity import backend, exact_copy, original_results, run, swapped_copy
from .parity import cast as cast_all
from .public_models import EXPERTS, HIDDEN, ec_dit_family, make_experts

__all__ = ["backend"]

MLP, SWIGLU = ec_dit_family("mlp"), ec_dit_family("swiglu")


@pytest.fixture(params=[MLP, SWIGLU], ids=lambda family: family.name)
def family(request):
    return request.param


class TestNumbers(Numbers):
    pass


class TestLifecycle(Lifecycle):
    @pytest.fixture
    def family(self):
        return MLP


class TestCompiled(Compiled):
    @pytest.fixture
    def family(self):
        return MLP


@pytest.mark.parametrize("kind", ["mlp, exact gelu", "mlp without bias"])
def test_other_experts(kind):
    family = ec_dit_family(kind)
    block, inputs = family.make(), family.inputs()
    actual, plain = run(swapped_copy(block), inputs), run(block, inputs)
    assert_parity(actual, plain, run(exact_copy(block), cast_all(inputs, torch.float64)))


@pytest.mark.parametrize(
    ("shape", "capacity", "shared"),
    [
        ((1, 12), 2, 0),
        ((2, 13), 1, 1),  # S / E is not an integer
        ((2, 10), 1.5, 0),
        ((2, 12), 4, 2),  # every expert takes every token, as a schedule starts
        ((3, 3), 1, 1),  # no expert takes a token
    ],
)
def test_capacities(shape, capacity, shared):
    family = ec_dit_family("mlp", capacity, shared)
    block, inputs = family.make(), family.inputs(torch.float32, *shape)
    block.capacity = 2
    swapped = swapped_copy(block)
    block.capacity = swapped.capacity = capacity  # schedules set it between steps
    actual = run(swapped, inputs)
    plain = original_results(family, block, inputs)
    assert_parity(actual, plain, run(exact_copy(block), cast_all(inputs, torch.float64)))


def test_an_image_does_not_depend_on_its_batch():
    swapped = swapped_copy(MLP.make())
    (x,) = MLP.inputs()
    torch.testing.assert_close(swapped(x)[1:], swapped(x[1:]))


def test_too_large_a_capacity_is_refused_as_by_the_original():
    block = ec_dit_family("mlp", 4.5).make()
    x = torch.randn(2, 12, HIDDEN)
    with pytest.raises(RuntimeError, match="out of range"):
        block(x)
    with pytest.raises(ValueError, match=r"capacity is 13; expected at most the 12 tokens"):
        swapped_copy(block)(x)


def test_under_autocast_only_the_swapped_block_keeps_the_dtype():
    block, inputs = MLP.make(), MLP.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert block(*inputs).dtype == torch.bfloat16
        assert swapped_copy(block)(*inputs).dtype == torch.float32


def break_gate(block: SparseMoEBlock) -> None:
    block.gate_weight = nn.Parameter(torch.randn(EXPERTS + 1, HIDDEN))


def break_capacity(block: SparseMoEBlock) -> None:
    del block.capacity


@pytest.mark.parametrize(
    ("break_block", "reason"),
    [(break_gate, "5 rows for 4 experts"), (break_capacity, "it has no capacity")],
)
def test_what_is_skipped(break_block, reason):
    block = MLP.make()
    break_block(block)
    with pytest.raises(mk.NothingMatched, match=reason):
        mk.apply(block)
    assert type(block) is SparseMoEBlock


def test_the_block_with_a_capacity_predictor_is_skipped():
    block = diffmoe_batch.SparseMoEBlock(make_experts("mlp"), HIDDEN, EXPERTS)
    with pytest.raises(mk.NothingMatched, match="capacity predictor"):
        mk.apply(block)
    assert len(block(torch.randn(2, 12, HIDDEN))) == 3
