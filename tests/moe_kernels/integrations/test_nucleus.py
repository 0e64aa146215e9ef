"""Nucleus-Image's block and model of diffusers on the kernels."""

import dataclasses
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import moe_kernels as mk

from .blocks import assert_parity
from .contract import Compiled, Lifecycle, Numbers
from .contract_models import WholeModels
from .families import HIDDEN, NUCLEUS, nucleus_block
from .parity import (
    Family,
    assert_stacked_weights_are_not_copied,
    backend,
    cast,
    exact_copy,
    run,
    swapped_copy,
)
from .whole_models import NUCLEUS_MODELS

pytest.importorskip("diffusers", reason="Nucleus-Image is in diffusers")

__all__ = ["backend"]

SOFTMAX = dataclasses.replace(NUCLEUS, name="softmax", build=partial(nucleus_block, False))


@pytest.fixture
def family():
    return NUCLEUS


class TestNumbers(Numbers):
    pass


class TestLifecycle(Lifecycle):
    pass


class TestCompiled(Compiled):
    pass


class TestWholeModels(WholeModels):
    @pytest.fixture
    def models(self):
        return NUCLEUS_MODELS


def compare(family: Family, dtype: torch.dtype = torch.float32, **attributes: object) -> None:
    """Assert parity of a block with other attributes."""

    def build():
        block = family.build()
        vars(block).update(attributes)
        return block

    changed = dataclasses.replace(family, build=build)
    block, inputs = changed.make(dtype), changed.inputs(dtype)
    exact = run(exact_copy(block), cast(inputs, torch.float64))
    assert_parity(run(swapped_copy(block), inputs), run(block, inputs), exact)


# What the swapped block does and the original does not.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_which_the_original_refuses(dtype):
    block = NUCLEUS.make()
    inputs = NUCLEUS.inputs()
    with torch.autocast("cpu", dtype):
        with pytest.raises(RuntimeError, match="dtype"):
            block(*inputs)
        assert swapped_copy(block)(*inputs).dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_asked_of_the_device_where_the_original_asks(training):
    block = NUCLEUS.make().train(training)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in NUCLEUS.inputs()]
        with pytest.raises(DataDependentOutputException):
            block(*fakes)
        assert swapped_copy(block)(*fakes).shape == fakes[0].shape


# Variants of the block.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax(dtype):
    compare(SOFTMAX, dtype)


@pytest.mark.parametrize("capacity_factor", [0.1, 1.3, 4.0])
def test_capacities(capacity_factor):
    compare(NUCLEUS, capacity_factor=capacity_factor)


def test_the_grouped_product_of_pytorch():
    block = NUCLEUS.make()
    block.experts.use_grouped_mm = True
    inputs = NUCLEUS.inputs()
    exact = run(exact_copy(NUCLEUS.make()), cast(inputs, torch.float64))
    assert_parity(run(swapped_copy(block), inputs), run(block, inputs), exact)


def test_without_a_timestep():
    block = NUCLEUS.make()
    tokens, unmodulated, timestep = NUCLEUS.inputs()
    wide = torch.cat([timestep.unsqueeze(1).expand(-1, tokens.shape[1], -1), unmodulated], -1)
    with_timestep = run(swapped_copy(block), (tokens, unmodulated, timestep))
    without = run(swapped_copy(block), (tokens, wide))
    assert torch.equal(without["out"], with_timestep["out"])
    assert torch.equal(without["argument 1"][..., HIDDEN:], with_timestep["argument 1"])


def test_arguments_by_name():
    block = swapped_copy(NUCLEUS.make())
    tokens, unmodulated, timestep = NUCLEUS.inputs()
    out = block(timestep=timestep, hidden_states=tokens, hidden_states_unmodulated=unmodulated)
    assert torch.equal(out, block(tokens, unmodulated, timestep))


def test_more_than_all_tokens():
    block = NUCLEUS.make()
    block.capacity_factor = 5.0
    with pytest.raises(RuntimeError, match="out of range"):
        block(*NUCLEUS.inputs())
    with pytest.raises(ValueError, match="capacity"):
        swapped_copy(block)(*NUCLEUS.inputs())


def test_gradients_lie_in_memory_as_their_weights():
    block = swapped_copy(NUCLEUS.make())
    out = block(*NUCLEUS.inputs())
    out.backward(torch.randn_like(out))
    for weight in (block.experts.gate_up_proj, block.experts.down_proj):
        assert weight.grad.is_contiguous()


def test_weights_are_read_where_they_are():
    assert_stacked_weights_are_not_copied(
        swapped_copy(NUCLEUS.make()), NUCLEUS.inputs(torch.float32, 1, 7)
    )


# What is not served.


def linear_orientation(block):
    block.experts.gate_up_proj = torch.nn.Parameter(torch.randn(4, 48, HIDDEN))


def two_dimensions(block):
    block.experts.down_proj = torch.nn.Parameter(torch.randn(24, HIDDEN))


def no_gate(block):
    del block.gate


def hooks(block):
    block.experts.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (linear_orientation, r"not \(E, D, 2F\) and \(E, F, D\)"),
        (two_dimensions, r"not \(E, D, 2F\) and \(E, F, D\)"),
        (no_gate, "has no gate"),
        (hooks, "experts has forward hooks"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_skipped(change, reason):
    block = NUCLEUS.make()
    change(block)
    original_class = type(block)
    with pytest.raises(mk.NothingMatched, match=reason):
        mk.apply(block)
    assert type(block) is original_class
