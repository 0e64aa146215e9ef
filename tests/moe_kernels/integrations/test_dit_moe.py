"""DiT-MoE's and TC-DiT's blocks on the kernels."""

import copy

import pytest
import torch
from torch import nn

import moe_kernels as mk
from moe_kernels.integrations.fp64 import in_fp64

from ...models.dit_moe import MoeMLP, SparseMoeBlock
from . import contract, parity
from .blocks import Results, assert_parity
from .contract import Compiled, Lifecycle, Numbers, rounded
from .parity import Family, backend, cast, run, swapped_copy
from .public_models import EXPERTS, HIDDEN, dit_moe_family, make_experts, tc_dit_family

__all__ = ["backend"]

DIT_MOE, TC_DIT = dit_moe_family(), tc_dit_family("mlp")


@pytest.fixture
def family():
    return DIT_MOE


@pytest.fixture(autouse=True)
def casts_to_fp64(monkeypatch):
    """TC-DiT's block casts to fp32, and would fail in fp64."""
    for module in (contract, parity):
        monkeypatch.setattr(module, "exact_copy", in_fp64)


class TestNumbers(Numbers):
    pass


class TestLifecycle(Lifecycle):
    pass


class TestCompiled(Compiled):
    pass


def compare(family: Family, *shape: int) -> tuple[Results, nn.Module]:
    """Assert parity in training; the swapped block's results and the original."""
    block = family.make()
    inputs = family.inputs(*((torch.float32, *shape) if shape else ()))
    actual = run(swapped_copy(block), inputs)
    assert_parity(actual, run(block, inputs), run(in_fp64(block), cast(inputs, torch.float64)))
    return actual, block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seq_aux": True},
        {"norm_topk_prob": True},
        {"top_k": 1, "norm_topk_prob": True},
        {"shared": None},
        {"shared": 1},
    ],
    ids=["published", "loss of each image", "renormalised", "top 1", "not shared", "one shared"],
)
def test_training_with_a_loss_that_counts(options, dtype):
    family = dit_moe_family(alpha=1.0, **options)
    block = family.make(dtype)
    inputs = family.inputs(dtype)
    actual = run(swapped_copy(block), inputs)
    plain = run(block, inputs)
    assert_parity(actual, plain, run(in_fp64(block), cast(inputs, torch.float64)))
    block.gate.alpha = 1e-30
    assert not torch.equal(run(block, inputs)["gate.weight"], plain["gate.weight"])


@pytest.mark.parametrize("kind", ["mlp", "mlp, exact gelu", "mlp without bias", "swiglu"])
@pytest.mark.parametrize(
    ("shared", "name_of_k"), [(1, "num_experts_per_tok"), (0, "top_k")], ids=["DiffMoE", "ProMoE"]
)
def test_tc_dit(kind, shared, name_of_k):
    compare(tc_dit_family(kind, shared, name_of_k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_tc_dit_in_evaluation(kind, dtype):
    family = tc_dit_family(kind)
    block = family.make(dtype).eval()
    inputs = family.inputs(dtype)
    actual, plain = (run(b, inputs, gradients=False) for b in (swapped_copy(block), block))
    exact = run(in_fp64(block), cast(inputs, torch.float64), gradients=False)
    assert_parity(actual, plain, exact)


def test_tc_dit_trains_in_bf16_which_the_original_refuses():
    block, inputs = TC_DIT.make(torch.bfloat16), TC_DIT.inputs(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtypes match"):
        block(*inputs)
    actual = run(swapped_copy(block), inputs)
    exact = run(in_fp64(block), cast(inputs, torch.float64))
    for name, result in actual.items():
        assert result.dtype == torch.bfloat16
        assert relative_norm(result, exact[name]) < 0.01, name


def relative_norm(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("training", [True, False])
def test_the_original_refuses_autocast(training):
    block = DIT_MOE.make().train(training)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="dtype"):
        block(*DIT_MOE.inputs())


def test_tc_dit_under_autocast():
    block, inputs = TC_DIT.make(), TC_DIT.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        actual, plain = (
            rounded(run(b, inputs), torch.bfloat16) for b in (swapped_copy(block), block)
        )
    assert_parity(actual, plain, run(in_fp64(block), cast(inputs, torch.float64)))


def test_in_evaluation_the_original_has_gradients_of_the_shared_expert_only():
    block = DIT_MOE.make().eval()
    out = block(*DIT_MOE.inputs())
    names, parameters = zip(*block.named_parameters(), strict=True)
    found = torch.autograd.grad(out, parameters, torch.randn_like(out), allow_unused=True)
    assert {name.split(".")[0] for name, g in zip(names, found, strict=True) if g is not None} == {
        "shared_experts"
    }


@pytest.mark.parametrize("seq_aux", [False, True])
def test_without_upstream_the_gradient_is_that_of_the_loss(seq_aux):
    family = dit_moe_family(alpha=1.0, seq_aux=seq_aux)
    block, inputs = family.make(), family.inputs()
    upstream = torch.zeros(inputs[0].shape)
    actual, plain = (run(b, inputs, upstream=upstream) for b in (swapped_copy(block), block))
    exact = run(in_fp64(block), cast(inputs, torch.float64), upstream=upstream)
    assert_parity(actual, plain, exact)
    _, _, loss = block.gate(*inputs)
    (expected,) = torch.autograd.grad(loss, [block.gate.weight])
    assert torch.equal(plain["gate.weight"], expected)
    assert expected.abs().max() > 1e-2
    assert not actual["experts.0.up_proj.weight"].any()


def test_the_loss_leaves_the_output_alone():
    family = dit_moe_family(alpha=1.0)
    block, inputs = family.make(), family.inputs()
    with_loss = swapped_copy(block)(*inputs)
    block.gate.alpha = 0.0
    assert torch.equal(swapped_copy(block)(*inputs), with_loss)
    with pytest.raises(AttributeError, match="numel"):
        block(*inputs)  # the original has no loss to add


@pytest.mark.parametrize("block_trains", [True, False])
@pytest.mark.parametrize("gate_trains", [True, False])
def test_the_loss_is_added_when_block_and_gate_are_in_training(block_trains, gate_trains):
    family = dit_moe_family(alpha=1.0)
    swapped, inputs = swapped_copy(family.make()), family.inputs()
    swapped.train(block_trains)
    swapped.gate.train(gate_trains)
    found = run(swapped, inputs, upstream=torch.zeros(inputs[0].shape))
    assert bool(found["gate.weight"].any()) == (block_trains and gate_trains)


def test_empty_experts_have_zero_gradients():
    family = dit_moe_family(alpha=1.0)
    block = family.make()
    inputs = (family.inputs()[0].abs(),)
    with torch.no_grad():
        block.gate.weight.mul_(0.01)
        block.gate.weight[:2] += 1.0
    actual, plain = run(swapped_copy(block), inputs), run(block, inputs)
    assert_parity(actual, plain, run(in_fp64(block), cast(inputs, torch.float64)))
    assert actual["experts.0.up_proj.weight"].any()
    assert not actual["experts.3.up_proj.weight"].any()


def test_hooks_on_an_expert_run_the_original():
    block, inputs = DIT_MOE.make(), DIT_MOE.inputs()
    swapped = swapped_copy(block)
    calls = []
    swapped.experts[1].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(swapped(*inputs), block(*inputs))
    assert calls


def break_scoring(block: SparseMoeBlock) -> None:
    block.gate.scoring_func = "sigmoid"


def break_experts(block: SparseMoeBlock) -> None:
    block.experts = block.experts[:-1]


def break_activation(block: SparseMoeBlock) -> None:
    block.experts[3].act_fn = nn.GELU()


def break_slices(block: SparseMoeBlock) -> None:
    block.experts = nn.ModuleList(MoeMLP(HIDDEN, 31) for _ in range(EXPERTS))


def break_gate(block: SparseMoeBlock) -> None:
    del block.gate.seq_aux


def break_dropout(block: SparseMoeBlock) -> None:
    block.experts = nn.ModuleList(make_experts("mlp"))
    block.experts[1].drop2.p = 0.1


def break_norm(block: SparseMoeBlock) -> None:
    block.experts = nn.ModuleList(make_experts("mlp"))
    block.experts[0].norm = nn.LayerNorm(24)


def break_gelu(block: SparseMoeBlock) -> None:
    block.experts = nn.ModuleList(make_experts("mlp"))
    block.experts[2].act = nn.GELU()


def break_class(block: SparseMoeBlock) -> None:
    block.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))


@pytest.mark.parametrize(
    ("break_block", "reason"),
    [
        (break_scoring, "scores by 'sigmoid'"),
        (break_experts, "4 rows for 3 experts"),
        (break_activation, r"act_fn of experts\.3 is a GELU"),
        (break_slices, "pretraining_tp 2 does not divide the 31 channels"),
        (break_gate, "no seq_aux"),
        (break_dropout, r"experts\.1\.drop2 is an active dropout"),
        (break_norm, r"experts\.0 has a norm"),
        (break_gelu, r"act of experts\.2 is GELU"),
        (break_class, r"experts\.0 is a Linear without fc1 or gate_proj"),
    ],
)
def test_what_is_skipped(break_block, reason):
    block = copy.deepcopy(DIT_MOE.make())
    break_block(block)
    with pytest.raises(mk.NothingMatched, match=reason):
        mk.apply(block)
    assert type(block) is SparseMoeBlock
