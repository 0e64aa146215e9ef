"""``apply(verify=True)``: what it lets pass, and what not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_kernels as mk
from moe_kernels.integrations.adapter import backend_of
from moe_kernels.integrations.hidream import HiDream
from moe_kernels.integrations.nucleus import Nucleus
from moe_kernels.integrations.swapped import Swapped

from .families import HIDREAM, MIXTRAL, NUCLEUS
from .parity import assert_same_bits, backend, run

pytest.importorskip("diffusers", reason="the blocks are those of diffusers")

__all__ = ["backend"]

RIGHT = HiDream.forward


class _Altered(torch.autograd.Function):
    """Multiplies the gradient by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def off_by_one_percent(self, module, x):
    return RIGHT(self, module, x) * 1.01


def not_a_number(self, module, x):
    out = RIGHT(self, module, x)
    return out.index_fill(1, torch.tensor([0]), float("nan"))


def gradient_off_by_one_percent(self, module, x):
    return _Altered.apply(RIGHT(self, module, x), 1.01)


def gradient_of_the_input_is_not_a_number(self, module, x):
    return RIGHT(self, module, _Altered.apply(x, float("nan")))


def gradient_of_the_last_weight_is_missing(self, module, x):
    last = module.experts[3].w3.weight
    kept, last.requires_grad = last.requires_grad, False
    out = RIGHT(self, module, x)
    last.requires_grad = kept
    return out


WRONG = [
    off_by_one_percent,
    not_a_number,
    gradient_off_by_one_percent,
    gradient_of_the_input_is_not_a_number,
    gradient_of_the_last_weight_is_missing,
]


CASES = [(wrong, torch.float32) for wrong in WRONG] + [
    (wrong, torch.bfloat16)  # which rounds by one percent itself
    for wrong in (not_a_number, gradient_of_the_input_is_not_a_number)
]


@pytest.mark.parametrize(
    ("wrong", "dtype"), CASES, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_wrong_adapter_is_found_and_taken_back(monkeypatch, wrong, dtype):
    model = nn.ModuleList([NUCLEUS.make(dtype), HIDREAM.make(dtype)])
    classes = [type(block) for block in model]
    inputs = NUCLEUS.inputs(dtype)
    before = run(model[0], inputs)
    monkeypatch.setattr(HiDream, "forward", wrong)
    with pytest.raises(mk.VerificationFailed, match=r"1 \(MOEFeedForwardSwiGLU\).*doctor"):
        mk.apply(model, verify=True)
    assert [type(block) for block in model] == classes
    assert not any(block._load_state_dict_post_hooks for block in model)
    assert_same_bits(run(model[0], inputs), before)
    assert mk.apply(model).swapped == ["0", "1"]  # who does not ask is not told


def test_blocks_swapped_before_the_call_stay(monkeypatch):
    model = nn.ModuleList([NUCLEUS.make(), HIDREAM.make()])
    mk.apply(model, "reference", include="0")
    monkeypatch.setattr(HiDream, "forward", off_by_one_percent)
    with pytest.raises(mk.VerificationFailed):
        mk.apply(model, verify=True)
    assert isinstance(model[0], Swapped)
    assert backend_of(model[0]) == "reference"
    assert not isinstance(model[1], Swapped)


def test_an_adapter_that_fails_is_taken_back(monkeypatch):
    def fail(*args):
        raise ZeroDivisionError

    model = nn.ModuleList([NUCLEUS.make(), HIDREAM.make()])
    monkeypatch.setattr(HiDream, "forward", fail)
    with pytest.raises(ZeroDivisionError):
        mk.apply(model, verify=True)
    assert not any(isinstance(block, Swapped) for block in model)


def test_gradients_in_evaluation_are_compared_where_the_original_has_them(monkeypatch):
    forward = Nucleus.forward

    def wrong(self, module, *args):
        return _Altered.apply(forward(self, module, *args), 1.01)

    monkeypatch.setattr(Nucleus, "forward", wrong)
    with pytest.raises(mk.VerificationFailed):
        mk.apply(NUCLEUS.make().eval(), verify=True)


@pytest.mark.parametrize("family", [HIDREAM, NUCLEUS, MIXTRAL], ids=lambda family: family.name)
def test_nothing_is_left_behind(family):
    block = family.make()
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.endswith("0.w1.weight"))
    state = {name: value.clone() for name, value in block.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():  # also where nobody wants gradients
        report = mk.apply(block, verify=True)
    assert torch.equal(torch.rand(3), expected)
    assert report.rows[0].gradient_error is not None
    assert all(parameter.grad is None for parameter in block.parameters())
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
    assert block.training


def test_a_block_on_the_meta_device_is_not_verified():
    block = HIDREAM.make().to("meta")
    (row,) = mk.apply(block, verify=True).rows
    assert row.status == "swapped"
    assert "not verified: weights are on the meta device" in row.detail
    assert row.output_error is None


def test_a_swapped_block_is_verified_again(monkeypatch):
    block = HIDREAM.make()
    mk.apply(block)
    (row,) = mk.apply(block, verify=True).rows
    assert row.status == "already swapped"
    assert row.output_error < 1
    monkeypatch.setattr(HiDream, "forward", off_by_one_percent)
    with pytest.raises(mk.VerificationFailed):
        mk.apply(block, verify=True)
