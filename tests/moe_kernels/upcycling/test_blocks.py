"""Which blocks are recognised, what is read from them, and why others are left alone."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moe_kernels as mk
from moe_kernels.testing import relative_error
from moe_kernels.upcycling import upcycle
from moe_kernels.upcycling.activations import recognise
from moe_kernels.upcycling.blocks import looks_like_mlp, read_dense
from tests.moe_kernels.upcycling.models import Blocks, Mlp


def transformers_mlp(module: str, name: str, act: str, **sizes: object) -> nn.Module:
    """A block of transformers, made from the attributes that its constructor reads."""
    import importlib
    from types import SimpleNamespace

    module_name = f"transformers.models.{module}.modeling_{module}"
    config = SimpleNamespace(
        hidden_size=16,
        intermediate_size=24,
        hidden_act=act,
        hidden_activation=act,
        mlp_bias=True,
        **sizes,
    )
    return getattr(importlib.import_module(module_name), name)(config)


TRANSFORMERS = [
    ("llama", "LlamaMLP", "silu", "swiglu"),
    ("mistral", "MistralMLP", "silu", "swiglu"),
    ("qwen2", "Qwen2MLP", "silu", "swiglu"),
    ("qwen3", "Qwen3MLP", "silu", "swiglu"),
    ("gemma", "GemmaMLP", "gelu_pytorch_tanh", "gelu_tanh gated"),
    ("phi3", "Phi3MLP", "silu", "swiglu"),
    ("clip", "CLIPMLP", "quick_gelu", "quick_gelu"),
    ("clip", "CLIPMLP", "gelu", "gelu"),
    ("siglip", "SiglipMLP", "gelu_pytorch_tanh", "gelu_tanh"),
    ("nemotron", "NemotronMLP", "relu2", "relu_squared"),
    ("gpt_neox", "GPTNeoXMLP", "gelu_new", "gelu_tanh"),
    ("phi", "PhiMLP", "gelu_fast", "gelu_tanh"),
    ("qwen3_vl", "Qwen3VLVisionMLP", "gelu_accurate", "gelu_tanh"),
]


@pytest.mark.parametrize(("module", "name", "act", "activation"), TRANSFORMERS)
def test_transformers_blocks(module, name, act, activation):
    check_block(transformers_mlp(module, name, act), activation)


DIFFUSERS = [
    ("gelu", "gelu"),
    ("gelu-approximate", "gelu_tanh"),
    ("geglu", "gelu gated"),
    ("geglu-approximate", "quick_gelu"),
    ("swiglu", "swiglu"),
    ("linear-silu", "silu"),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("final_dropout", [True, False])
@pytest.mark.parametrize(("act", "activation"), DIFFUSERS)
def test_diffusers_blocks(act, activation, final_dropout, bias):
    from diffusers.models.attention import FeedForward

    block = FeedForward(16, inner_dim=24, activation_fn=act, final_dropout=final_dropout, bias=bias)
    check_block(block, activation)


@pytest.mark.parametrize("bias", [(True, True), (True, False), (False, True), (False, False)])
def test_timm_blocks(bias):
    check_block(Mlp(bias=bias), "gelu_tanh")


def check_block(block: nn.Module, activation: str) -> None:
    """Read, copied and split it is the same function, with the same biases."""
    assert looks_like_mlp(block)
    block = block.double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    expected = block(x)
    dense = read_dense(block)
    assert (dense.hidden_size, dense.intermediate_size) == (16, 24)
    assert relative_error(dense(x), expected) < 1e-11  # gelu_fast has ten digits of its constant
    for options in ({"mode": "copy"}, {"mode": "split", "shards": 3}):
        model = Blocks(copy.deepcopy(block))
        report = upcycle(model, 6, "token_choice", **options)
        assert report.upcycled[0].activation == activation
        assert relative_error(model.mlps[0](x), expected) < 1e-11
        size = sum(parameter.numel() for parameter in block.parameters())
        copies = 6 if options["mode"] == "copy" else 2
        bias_out = 0 if dense.bias_out is None else (6 - copies) * 16  # each shard has one
        assert report.upcycled[0].parameters_after == copies * size + bias_out + 6 * 16


def test_an_activation_given_as_a_function():
    block = Mlp()
    block.act = None
    del block._modules["act"]
    block.act = partial(F.gelu, approximate="tanh")
    check_block(block, "gelu_tanh")


class ClippedGELU(nn.Module):
    def forward(self, x):
        return F.gelu(x).clamp(-10, 10)


@pytest.mark.parametrize("act", [nn.Tanh(), nn.PReLU(), nn.ReLU6(), ClippedGELU(), nn.Softmax(-1)])
def test_other_activations_are_not_taken_for_known_ones(act):
    assert recognise(act) is None
    assert "an activation that the experts do not have" in why_skipped(Mlp(act=act))


def test_things_that_are_no_activation():
    assert recognise(None) is None
    assert recognise(nn.Linear(3, 3)) is None
    assert recognise(lambda: 0) is None
    assert recognise(lambda x: x.sum()) is None


def why_skipped(block: nn.Module, **options) -> str:
    """Reason in the report, beside a block that is upcycled."""
    model = Blocks(block, Mlp())
    report = upcycle(model, 4, **options)
    assert model.mlps[0] is block
    assert [entry.path for entry in report.upcycled] == ["mlps.1"]
    (entry,) = report.skipped
    assert entry.path == "mlps.0"
    assert entry.class_name == type(block).__name__
    assert entry.skipped in str(report)
    return entry.skipped


class QuantisedLinear(nn.Linear):
    pass


def test_blocks_that_are_left_alone_with_a_reason():
    assert "drop1 drops 0.1 of its input; set its p to 0" in why_skipped(Mlp(drop=0.1))
    normed = Mlp(norm=nn.LayerNorm(24))
    assert "submodule norm (LayerNorm) that is not known" in why_skipped(normed)
    convolution = Mlp()
    convolution.fc1 = nn.Conv2d(16, 24, 1)
    assert "fc1 is torch.nn.modules.conv.Conv2d, not torch.nn.Linear" in why_skipped(convolution)
    quantised = Mlp()
    quantised.fc2 = QuantisedLinear(24, 16)
    assert "QuantisedLinear, not torch.nn.Linear" in why_skipped(quantised)
    weight_normed = Mlp()
    nn.utils.parametrizations.weight_norm(weight_normed.fc1)
    assert "ParametrizedLinear, not torch.nn.Linear" in why_skipped(weight_normed)
    wide = Mlp()
    wide.fc2 = nn.Linear(24, 17)
    assert "maps 16 features to 17; must keep the width" in why_skipped(wide)
    mixed = Mlp()
    mixed.fc2.bfloat16()
    reason = why_skipped(mixed)
    assert reason == "its weights have more than one dtype: torch.bfloat16, torch.float32"
    packed = Mlp()
    packed.fc1 = nn.Linear(16, 48)
    assert "give 48 and take 24 features; expected 24 and 24" in why_skipped(packed)
    no_act = Mlp()
    del no_act.act
    assert "no attribute act, act_fn, activation_fn or activation" in why_skipped(no_act)
    hooked = Mlp()
    hooked.fc1.register_forward_hook(lambda *_: None)
    assert "fc1 has hooks; remove them first" in why_skipped(hooked)
    replaced = Mlp()
    replaced.forward = nn.Identity().forward
    assert "forward of the block is replaced on the instance" in why_skipped(replaced)
    scaled = Mlp()
    scaled.gamma = nn.Parameter(torch.ones(16))
    assert "has a tensor of its own: gamma" in why_skipped(scaled)
    overflowing = Mlp()
    nn.init.constant_(overflowing.fc2.bias, float("inf"))
    assert "its output on random tokens is not finite" in why_skipped(overflowing)
    odd = Mlp(intermediate_size=25)
    reason = why_skipped(odd, mode="split")
    assert reason == "intermediate size 25 is no multiple of shards = 2"


def test_gate_and_up_with_one_bias():
    block = transformers_mlp("llama", "LlamaMLP", "silu")
    block.up_proj = nn.Linear(16, 24, bias=False)
    assert "only one of its gate and up projections has a bias" in why_skipped(block)


def test_unknown_layouts_of_diffusers():
    from diffusers.models.attention import FeedForward

    block = FeedForward(16)
    block.net[0] = nn.Linear(16, 64)
    assert "net starts with Linear and has 3 entries" in why_skipped(block)
    dropping = FeedForward(16, dropout=0.2)
    assert "net.1 drops 0.2" in why_skipped(dropping)


class TwiceMlp(Mlp):
    def forward(self, x):
        return 2 * super().forward(x)


class PairMlp(Mlp):
    def forward(self, x):
        return super().forward(x), x


class ConditionedMlp(Mlp):
    def forward(self, x, condition):
        return super().forward(x) + condition


class StrangeMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.second(self.first(x))


def test_blocks_whose_forward_is_another_are_found_out():
    assert "its forward is not the MLP that its attributes show" in why_skipped(TwiceMlp())
    assert "does not return one tensor" in why_skipped(PairMlp())
    assert "its forward fails on random tokens" in why_skipped(ConditionedMlp())
    assert why_skipped(StrangeMLP()) == "unknown layout (submodules: first, second)"


def test_frozen_weights_stay_frozen():
    frozen = Blocks(Mlp()).requires_grad_(False)
    upcycle(frozen, 4)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    partly = Blocks(Mlp())
    partly.mlps[0].fc2.requires_grad_(False)
    partly.mlps[0].fc1.bias.requires_grad_(False)
    upcycle(partly, 4, "token_choice")
    block = partly.mlps[0]
    trained = {name for name, p in block.named_parameters() if p.requires_grad}
    assert trained == {"router.weight", "experts.up_proj"}


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(training):
    model = Blocks(Mlp()).train(training)
    upcycle(model, 4)
    assert all(module.training == training for module in model.modules())


def test_experts_of_a_mixture_are_left_alone():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([Mlp(), Mlp()])
            self.shared_experts = Mlp()

    model = Blocks(Mlp())
    model.moe = Mixture()
    report = upcycle(model, 4)
    assert [entry.path for entry in report.upcycled] == ["mlps.0"]
    assert {entry.skipped for entry in report.skipped} == {"part of a mixture of experts"}
    assert len(report.skipped) == 3


def test_nothing_matched_says_what_was_seen():
    with pytest.raises(mk.NothingMatched, match=r"Linear holds no module whose class is called"):
        upcycle(nn.Linear(3, 3), 4)
    with pytest.raises(mk.NothingMatched, match=r"mlps.0 \(StrangeMLP\): unknown layout"):
        upcycle(Blocks(StrangeMLP()), 4)
    model = Blocks(Mlp())
    upcycle(model, 4)
    before = model.mlps[0]
    with pytest.raises(mk.NothingMatched, match="upcycled already"):
        upcycle(model, 4)
    assert model.mlps[0] is before
