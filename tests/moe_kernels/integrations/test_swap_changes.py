"""What becomes of a swapped block whose parts are changed later: it never ignores the change."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import moe_kernels as mk

from .families import HIDREAM, MIXTRAL, NUCLEUS
from .parity import assert_same_bits, backend, run, swapped_copy
from .public_models import dit_moe_family, ec_dit_family

pytest.importorskip("diffusers", reason="the blocks are those of diffusers")

__all__ = ["backend"]

DIT_MOE, EC_DIT = dit_moe_family(), ec_dit_family("mlp")


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


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
    model = nn.ModuleList([HIDREAM.make(), MIXTRAL.make()])
    mk.apply(model)
    parametrize.register_parametrization(model[1], "down_proj", Doubled())
    classes = [type(block) for block in model]
    with pytest.raises(ValueError, match="wrapped in another class since"):
        mk.revert(model)
    assert [type(block) for block in model] == classes  # all or none
    parametrize.remove_parametrizations(model[1], "down_proj")
    assert mk.revert(model).reverted == ["0", "1"]


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


def another_activation(block):
    block.experts[2].act_fn = nn.GELU()


def a_hook_on_an_activation(block):
    block.experts[2].act_fn.register_forward_hook(lambda module, args, out: 2 * out)


def a_hook_on_a_gelu(block):
    block.experts[2].act.register_forward_hook(lambda module, args, out: 2 * out)


def dropout(block):
    block.experts[2].drop1.p = 1.0


@pytest.mark.parametrize(
    ("family", "change"),
    [
        (DIT_MOE, another_activation),
        (DIT_MOE, a_hook_on_an_activation),
        (EC_DIT, a_hook_on_a_gelu),
        (EC_DIT, dropout),
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
