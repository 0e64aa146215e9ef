"""micro-diffusion's block on the kernels."""

import copy

import pytest
import torch
from torch import nn

import moe_kernels as mk
from moe_kernels.integrations.fp64 import in_fp64

from ...models.micro_diffusion import FeedForwardECMoe
from . import contract, parity
from .blocks import assert_parity
from .contract import Compiled, Lifecycle, Numbers, rounded
from .parity import backend, cast, on_backends, original_results, run, swapped_copy
from .public_models import EXPERTS, HIDDEN, micro_diffusion_family

__all__ = ["backend"]

MICRO = micro_diffusion_family()


@pytest.fixture
def family():
    return MICRO


@pytest.fixture(autouse=True)
def casts_to_fp64(monkeypatch):
    """The original casts to fp32, and would fail in fp64."""
    for module in (contract, parity):
        monkeypatch.setattr(module, "exact_copy", in_fp64)


class TestNumbers(Numbers):
    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("served_by", on_backends("reference", "cpu"))
    def test_outputs_and_gradients(self, family, served_by, dtype, training):
        block = family.make(dtype).train(training)
        inputs = family.inputs(dtype)
        actual = run(swapped_copy(block, served_by), inputs)
        if dtype == torch.float32:
            plain = run(block, inputs)
        else:
            with pytest.raises(RuntimeError, match="same dtype"):
                block(*inputs)
            with torch.autocast("cpu", dtype):  # as near to 16 bits as the original gets
                plain = run(copy.deepcopy(block).float(), cast(inputs, torch.float32))
            plain = rounded(plain, dtype)
        assert_parity(actual, plain, run(in_fp64(block), cast(inputs, torch.float64)))


class TestLifecycle(Lifecycle):
    pass


class TestCompiled(Compiled):
    pass


@pytest.mark.parametrize(
    ("shape", "capacity", "approximate"),
    [
        ((1, 13), 1, "none"),  # S / E is not an integer
        ((3, 10), 1.5, "tanh"),
        ((2, 12), 4, "none"),  # every expert takes every token
        ((2, 3), 1, "none"),  # no expert takes a token
    ],
)
def test_capacities_and_activations(shape, capacity, approximate):
    family = micro_diffusion_family(capacity, approximate)
    block, inputs = family.make(), family.inputs(torch.float32, *shape)
    actual = run(swapped_copy(block), inputs)
    plain = original_results(family, block, inputs)
    assert_parity(actual, plain, run(in_fp64(block), cast(inputs, torch.float64)))


def test_gradients_have_the_layout_of_their_weights():
    block = swapped_copy(MICRO.make())
    out = block(*MICRO.inputs())
    out.backward(torch.randn_like(out))
    for weight in (block.w1, block.w2):
        assert weight.grad.is_contiguous()


def test_under_autocast_only_the_swapped_block_keeps_the_dtype():
    block, inputs = MICRO.make(), MICRO.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert block(*inputs).dtype == torch.bfloat16
        assert swapped_copy(block)(*inputs).dtype == torch.float32


def test_a_hook_on_the_gate_is_called():
    block = swapped_copy(MICRO.make())
    calls = []
    block.gate.register_forward_hook(lambda *_: calls.append(1))
    block(*MICRO.inputs())
    assert calls == [1]


def break_activation(block: FeedForwardECMoe) -> None:
    block.gelu = nn.SiLU()


def break_weights(block: FeedForwardECMoe) -> None:
    block.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 32))


def break_count(block: FeedForwardECMoe) -> None:
    block.num_experts = 5


@pytest.mark.parametrize(
    ("break_block", "reason"),
    [
        (break_activation, "a SiLU, not a GELU"),
        (break_weights, r"not \(E, D, F\) and \(E, F, D\)"),
        (break_count, "4 experts; num_experts is 5"),
    ],
)
def test_what_is_skipped(break_block, reason):
    block = MICRO.make()
    break_block(block)
    with pytest.raises(mk.NothingMatched, match=reason):
        mk.apply(block)
    assert type(block) is FeedForwardECMoe
