"""What is hung into the parts of a swapped block is called: the block then runs as before."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import moe_kernels as mk
from moe_kernels.integrations import swapped as swapped_module
from moe_kernels.integrations.swapped import Swapped

from .blocks import assert_parity
from .families import HIDREAM, MIXTRAL, NUCLEUS
from .parity import assert_same_bits, backend, cast, exact_copy, run, swapped_copy

pytest.importorskip("diffusers", reason="the blocks are those of diffusers")

__all__ = ["backend"]


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch):
    """Each reason is logged once in a process."""
    monkeypatch.setattr(swapped_module, "_logged", set())


class LoraLinear(nn.Module):
    """What peft puts in the place of a linear layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        generator = torch.Generator().manual_seed(2)
        self.lora_a = nn.Parameter(torch.randn(2, base_layer.in_features, generator=generator))
        self.lora_b = nn.Parameter(torch.randn(base_layer.out_features, 2, generator=generator))

    @property
    def weight(self) -> nn.Parameter:
        return self.base_layer.weight

    @property
    def bias(self) -> None:
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.lora_a.T @ self.lora_b.T


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def hook_on_a_layer(block):
    block.experts[1].w2.register_forward_hook(lambda module, args, out: 2 * out)


def pre_hook_on_an_expert(block):
    block.experts[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook_on_an_expert(block):
    block.experts[1].register_full_backward_hook(lambda module, grads, _: (grads[0] * 2,))


def lora(block):
    block.experts[1].w1 = LoraLinear(block.experts[1].w1)


def parametrization(block):
    parametrize.register_parametrization(block.experts[1].w1, "weight", Doubled())


def forward_of_an_expert(block):
    block.experts[1].forward = lambda x: 3 * x


def hook_on_the_gate(block):
    block.gate.register_forward_hook(lambda module, args, out: (out[0], 2 * out[1], out[2]))


def forward_of_the_gate(block):
    forward = block.gate.forward
    block.gate.forward = lambda x: (forward(x)[0], 2 * forward(x)[1], None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_on_a_layer, "experts.1.w2 has forward hooks"),
        (pre_hook_on_an_expert, "experts.1 has forward hooks"),
        (backward_hook_on_an_expert, "experts.1 has backward hooks"),
        (lora, "experts.1.w1 is a LoraLinear now"),
        (parametrization, "experts.1.w1 is a ParametrizedLinear now"),
        (forward_of_an_expert, "the forward of experts.1 was replaced"),
        (hook_on_the_gate, "gate has forward hooks"),
        (forward_of_the_gate, "the forward of gate was replaced"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_original_runs_and_says_why(caplog, change, reason):
    original = HIDREAM.make()
    inputs = HIDREAM.inputs()
    block = swapped_copy(original)
    unchanged = run(original, inputs)
    change(original)
    change(block)
    expected = run(original, inputs)
    assert any(not torch.equal(expected[n], unchanged[n]) for n in unchanged if n in expected)
    with caplog.at_level(logging.WARNING, "moe_kernels"):
        assert_same_bits(run(block, inputs), expected)
        run(block, inputs)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        f"a swapped MOEFeedForwardSwiGLU runs its original forward, because {reason}"
        + (" on the instance" if reason.endswith("replaced") else "")
    )
    # A block that has it already is left alone, for the same reason.
    (row,) = mk.apply(original, strict=False).rows
    assert row.status == "skipped"
    assert reason.removesuffix(" now") in row.detail


def test_the_kernels_run_again_without_the_hook():
    block = swapped_copy(HIDREAM.make())
    inputs = HIDREAM.inputs()
    expected = run(block, inputs)
    calls = []
    hook = block.experts[0].register_forward_hook(lambda *_: calls.append(1))
    run(block, inputs)
    assert calls == [1]
    hook.remove()
    assert_same_bits(run(block, inputs), expected)
    assert calls == [1]


def test_hooks_of_the_block_itself_run():
    block = HIDREAM.make()
    calls = []
    block.register_forward_hook(lambda module, args, out: calls.append("before the swap"))
    mk.apply(block)
    block.register_forward_pre_hook(lambda module, args: calls.append("after the swap"))
    block.shared_experts.register_forward_hook(lambda *_: calls.append("shared expert"))
    block(*HIDREAM.inputs())
    assert calls == ["after the swap", "shared expert", "before the swap"]
    assert isinstance(block, Swapped)


@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
def test_a_hook_added_after_compilation():
    """By default PyTorch does not notice hooks that are added later, of any module."""
    block = HIDREAM.make()
    inputs = HIDREAM.inputs()
    mk.apply(block)
    compiled = torch.compile(block, backend="eager")
    compiled(*inputs)
    hook_on_a_layer(block)
    mk.revert(plain := copy.deepcopy(block))
    torch.testing.assert_close(compiled(*inputs), plain(*inputs))


def test_nucleus_experts_with_a_hook():
    original = NUCLEUS.make()
    inputs = NUCLEUS.inputs()
    block = swapped_copy(original)
    for module in (original, block):
        module.experts.register_forward_hook(lambda module, args, out: 2 * out)
    assert_same_bits(run(block, inputs), run(original, inputs))


def test_a_hook_on_the_activation_of_stacked_experts():
    """Then the activation is called, between the products on the kernels."""
    original = MIXTRAL.make()
    inputs = MIXTRAL.inputs()
    block = swapped_copy(original)
    for module in (original, block):
        module.act_fn.register_forward_hook(lambda module, args, out: 2 * out)
    exact = run(exact_copy(original), cast(inputs, torch.float64))
    assert_parity(run(block, inputs), run(original, inputs), exact)
