"""What becomes of a swapped block whose parts are changed later: it never ignores the change."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import moe_kernels as mk
from moe_kernels.integrations import swapped as swapped_module
from moe_kernels.integrations.swapped import Swapped

from .families import HIDREAM, MIXTRAL, NUCLEUS
from .parity import assert_same_bits, backend, run, swapped_copy

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


def test_a_hook_added_after_compilation(monkeypatch):
    """By default PyTorch does not notice hooks that are added later, of any module."""
    monkeypatch.setattr(torch._dynamo.config, "skip_nnmodule_hook_guards", False)
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


@pytest.mark.parametrize(
    ("family", "path", "name"),
    [
        (NUCLEUS, "experts", "gate_up_proj"),
        (MIXTRAL, "", "down_proj"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_parametrized_weight_is_computed(family, path, name, when):
    """LoRA on stacked experts is such a parametrization."""

    def change(block):
        parametrize.register_parametrization(block.get_submodule(path), name, Doubled())

    original = family.make()
    inputs = family.inputs()
    block = copy.deepcopy(original)
    for step in ("before", "apply", "after"):
        if step == "apply":
            mk.apply(block)
        elif step == when:
            change(block)
    with torch.no_grad():
        original.get_submodule(path).get_parameter(name).mul_(2)
    expected = run(swapped_copy(original), inputs)
    actual = run(block, inputs)
    weight = f"{path}.{name}".lstrip(".")
    gradient = actual.pop(f"{path}.parametrizations.{name}.original".lstrip("."))
    assert torch.equal(gradient, 2 * expected.pop(weight))
    assert_same_bits(actual, expected)


def test_what_was_wrapped_after_the_swap_is_not_reverted():
    block = MIXTRAL.make()
    mk.apply(block)
    parametrize.register_parametrization(block, "down_proj", Doubled())
    wrapped = type(block)
    with pytest.raises(ValueError, match="wrapped in another class since"):
        mk.revert(block)
    assert type(block) is wrapped
    parametrize.remove_parametrizations(block, "down_proj")
    assert mk.revert(block).reverted == [""]


def test_a_forward_replaced_on_the_instance():
    """Offloading hooks of accelerate do so: they are called in any case."""
    block = HIDREAM.make()
    inputs = HIDREAM.inputs()
    block.forward = block.forward
    with pytest.raises(mk.NothingMatched, match="its forward was replaced on the instance"):
        mk.apply(block)
    del block.forward
    mk.apply(block)
    forward = block.forward
    block.forward = lambda *args: 2 * forward(*args)
    expected = 2 * swapped_copy(HIDREAM.make())(*inputs)
    assert torch.equal(block(*inputs), expected)


def other_class(module, method):
    """Give a module a subclass of its class with another ``forward``."""
    module.__class__ = type("Other", (type(module),), {"forward": method})


def other_gate(block):
    def forward(self, x):
        index, weights, loss = super(type(self), self).forward(x)
        return index, 2 * weights, loss

    other_class(block.gate, forward)


def other_expert(block):
    def forward(self, x):
        return self.w2(torch.relu(self.w1(x)) * self.w3(x))

    other_class(block.experts[2], forward)


def an_expert_that_does_nothing(block):
    block.experts[2] = nn.Identity()


def a_bias(block):
    block.experts[2].w1.bias = nn.Parameter(torch.ones(256))


def other_stacked_experts(block):
    def forward(self, x, num_tokens_per_expert):
        return 2 * super(type(self), self).forward(x, num_tokens_per_expert)

    other_class(block.experts, forward)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        (HIDREAM, other_gate),
        (HIDREAM, other_expert),
        (HIDREAM, an_expert_that_does_nothing),
        (HIDREAM, a_bias),
        (NUCLEUS, other_stacked_experts),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_parts_that_compute_something_else_are_called(family, change):
    original = family.make()
    inputs = family.inputs()
    block = swapped_copy(original)
    unchanged = run(block, inputs)["out"]
    change(original)
    change(block)
    expected = run(original, inputs)
    assert not torch.allclose(expected["out"], unchanged)
    assert_same_bits(run(block, inputs), expected)
    assert_same_bits(run(copy.deepcopy(block).float(), inputs), expected)
    (row,) = mk.apply(original, strict=False).rows
    assert row.status == "skipped"


def test_a_frozen_copy_and_functional_calls():
    block = swapped_copy(HIDREAM.make())
    inputs = HIDREAM.inputs()
    expected = block(*inputs)
    state = {name: value.clone() for name, value in block.state_dict().items()}
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert torch.equal(torch.func.functional_call(block, state, inputs), expected)
    assert not block(*inputs).any()
