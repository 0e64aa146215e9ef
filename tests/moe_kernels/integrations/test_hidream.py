"""HiDream-I1's block and model of diffusers on the kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import moe_kernels as mk
from moe_kernels.testing import ERROR_FLOOR, relative_error

from .blocks import assert_parity
from .contract import Compiled, Lifecycle, Numbers
from .contract_models import WholeModels
from .families import HIDREAM
from .parity import assert_same_bits, backend, cast, exact_copy, run, swapped_copy
from .whole_models import HIDREAM_MODELS

pytest.importorskip("diffusers", reason="HiDream-I1 is in diffusers")

__all__ = ["backend"]


@pytest.fixture
def family():
    return HIDREAM


class TestNumbers(Numbers):
    pass


class TestLifecycle(Lifecycle):
    pass


class TestCompiled(Compiled):
    pass


class TestWholeModels(WholeModels):
    @pytest.fixture
    def models(self):
        return HIDREAM_MODELS


def compare(block: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Assert parity; the results of the swapped block."""
    actual = run(swapped_copy(block), inputs)
    exact = run(exact_copy(block), cast(inputs, torch.float64))
    assert_parity(actual, run(block, inputs), exact)
    return actual


# What the swapped block does and the original does not.


def test_evaluation_is_differentiable_where_the_original_has_no_gradients():
    block = HIDREAM.make()
    inputs = HIDREAM.inputs()
    in_training = run(swapped_copy(block), inputs)
    block.eval()
    in_evaluation = run(swapped_copy(block), inputs)
    original = run(block, inputs)
    missing = in_evaluation.keys() - original.keys()
    assert missing == {n for n in in_evaluation if n.startswith(("experts.", "gate."))}
    # Its gradient of the input is that of the shared expert alone.
    difference = original["argument 0"] - in_evaluation["argument 0"]
    assert difference.abs().max() > 0.1 * in_evaluation["argument 0"].abs().max()
    assert_same_bits(in_evaluation, in_training)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_output_under_autocast_has_the_dtype_of_the_input(dtype):
    block = HIDREAM.make().eval()
    inputs = HIDREAM.inputs()
    with torch.autocast("cpu", dtype):
        assert block(*inputs).dtype == dtype
        assert swapped_copy(block)(*inputs).dtype == torch.float32


def test_the_balance_loss_that_nobody_reads_is_not_computed(monkeypatch):
    block = HIDREAM.make()
    inputs = HIDREAM.inputs()
    expected = run(block, inputs)

    def fail(*args, **kwargs):
        raise AssertionError("computed")

    monkeypatch.setattr(F, "one_hot", fail)
    with pytest.raises(AssertionError, match="computed"):
        block(*inputs)
    actual = run(swapped_copy(block), inputs)
    for name, result in actual.items():
        assert relative_error(result, expected[name]) <= 4 * ERROR_FLOOR[result.dtype], name


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_asked_of_the_device_where_the_original_asks(training):
    block = HIDREAM.make().train(training)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in HIDREAM.inputs()]
        with pytest.raises(DynamicOutputShapeException):
            block(*fakes)
        assert swapped_copy(block)(*fakes).shape == fakes[0].shape


# Variants of the block.


@pytest.mark.parametrize("top_k", [1, 3, 4])
@pytest.mark.parametrize("renormalised", [True, False])
def test_other_gates(top_k, renormalised):
    block = HIDREAM.make()
    block.gate.top_k = block.num_activated_experts = top_k
    block.gate.norm_topk_prob = renormalised
    compare(block, HIDREAM.inputs())


def test_experts_without_tokens():
    block = HIDREAM.make()
    with torch.no_grad():
        block.gate.weight[1:3] = -5.0
        block.gate.weight[3] = 1.0
        block.gate.weight[0] = 2.0
    actual = compare(block, (HIDREAM.inputs()[0].abs(),))
    for expert in (1, 2):
        assert not actual[f"experts.{expert}.w1.weight"].any()
        assert not actual[f"experts.{expert}.w2.weight"].any()
    assert actual["experts.0.w1.weight"].any()


def test_no_tokens():
    swapped = swapped_copy(HIDREAM.make())
    found = run(swapped, (torch.zeros(2, 0, 16),))
    assert found["out"].shape == (2, 0, 16)
    assert not any(result.any() for result in found.values())


def test_the_inference_form_in_training():
    """``force_inference_output`` of the model: evaluation's code path, whatever the mode."""
    block = HIDREAM.make()
    block._force_inference_output = block.gate._force_inference_output = True
    inputs = HIDREAM.inputs()
    expected = run(swapped_copy(HIDREAM.make()), inputs)
    original = run(block, inputs)
    assert "gate.weight" not in original
    (row,) = mk.apply(block, verify=True).rows
    assert row.output_error < 1
    assert row.gradient_error is None
    assert_same_bits(run(block, inputs), expected)


# What is not served.


def other_scores(block):
    block.gate.scoring_func = "sigmoid"


def fewer_experts(block):
    block.experts = block.experts[:3]


def one_expert_of_another_class(block):
    block.experts[2] = nn.Linear(16, 16)


def one_expert_of_another_size(block):
    block.experts[2].w1 = nn.Linear(16, 128, bias=False)


def a_bias(block):
    block.experts[1].w3 = nn.Linear(16, 256)


def a_layer_of_another_class(block):
    class LoraLinear(nn.Linear):
        pass

    block.experts[1].w3 = LoraLinear(16, 256, bias=False)


def another_dtype(block):
    block.experts[3].bfloat16()


def no_gate(block):
    del block.gate


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_scores, "scores by 'sigmoid'"),
        (fewer_experts, "4 rows for 3 experts"),
        (one_expert_of_another_class, "experts.2 is a Linear, unlike experts.0"),
        (one_expert_of_another_size, "experts.2 differs from experts.0"),
        (a_bias, "experts.1.w3 has a bias"),
        (a_layer_of_another_class, "experts.1.w3 is a LoraLinear, not an nn.Linear"),
        (another_dtype, "experts.3 differs from experts.0"),
        (no_gate, "has no gate"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_skipped(change, reason):
    block = HIDREAM.make()
    change(block)
    original_class = type(block)
    with pytest.raises(mk.NothingMatched, match=reason):
        mk.apply(block)
    (row,) = mk.apply(block, strict=False).rows
    assert row.status == "skipped"
    assert type(block) is original_class
