"""Experts of transformers' models on the kernels."""

import sys

import pytest
import torch
from torch import nn

import moe_kernels as mk
from moe_kernels.integrations import transformers_experts as experts_module

from .blocks import assert_parity
from .contract import Compiled, Lifecycle, Numbers
from .contract_models import FEW, WholeModels
from .families import EXPERTS, GPT_OSS, MIXTRAL, RARE, TRANSFORMERS
from .parity import (
    Family,
    assert_same_bits,
    assert_stacked_weights_are_not_copied,
    backend,
    cast,
    exact_copy,
    run,
    swapped_copy,
)
from .whole_models import LANGUAGE_MODELS, language_model

transformers = pytest.importorskip("transformers", reason="the models are those of transformers")

__all__ = ["backend"]


@pytest.fixture(params=[MIXTRAL, GPT_OSS], ids=lambda family: family.name)
def family(request):
    """One that is fused, and one that is served stage by stage."""
    return request.param


class TestNumbers(Numbers):
    @pytest.fixture(params=TRANSFORMERS, ids=lambda family: family.name)
    def family(self, request):
        return request.param


class TestLifecycle(Lifecycle):
    pass


class TestCompiled(Compiled):
    def test_inductor(self):
        super().test_inductor(MIXTRAL)


class TestWholeModels(WholeModels):
    @pytest.fixture(params=LANGUAGE_MODELS)
    def models(self, request):
        return LANGUAGE_MODELS[request.param]


def compare(family: Family, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Assert parity; the results of the swapped experts."""
    block = family.make()
    actual = run(swapped_copy(block), inputs)
    exact = run(exact_copy(block), cast(inputs, torch.float64))
    assert_parity(actual, run(block, inputs), exact)
    return actual


@pytest.mark.parametrize("family", RARE, ids=lambda family: family.name)
def test_layouts_of_few_models(family):
    """Transposed, with a norm behind each expert, without a gate, transposed with biases."""
    compare(family, family.inputs())


def test_what_is_fused():
    def told(family: Family) -> str:
        return mk.apply(family.make()).rows[0].detail

    for family in (*TRANSFORMERS[:3], RARE[0]):
        assert "fused swiglu" in told(family), family.name
    for family in (GPT_OSS, *RARE[1:]):
        assert "the model's own activation" in told(family), family.name


@pytest.mark.parametrize("family", [*TRANSFORMERS, *RARE], ids=lambda family: family.name)
def test_weights_are_read_where_they_are(family):
    assert_stacked_weights_are_not_copied(
        swapped_copy(family.make()), family.inputs(torch.float32, 1, 7)
    )


# The router may choose anything.


def test_experts_without_tokens():
    tokens, index, weights = MIXTRAL.inputs()
    actual = compare(MIXTRAL, (tokens, index % 2, weights))
    assert not actual["gate_up_proj"][2:].any()
    assert actual["gate_up_proj"][:2].any()


@pytest.mark.parametrize("family", [MIXTRAL, GPT_OSS], ids=lambda family: family.name)
def test_an_expert_twice_for_a_token(family):
    tokens, index, weights = family.inputs()
    compare(family, (tokens, index[:, :1].expand(-1, 2), weights))


@pytest.mark.parametrize("family", [MIXTRAL, GPT_OSS], ids=lambda family: family.name)
def test_no_tokens(family):
    inputs = tuple(t[:0] for t in family.inputs())
    found = run(swapped_copy(family.make()), inputs)
    assert found["out"].shape == (0, 16)
    assert not any(result.any() for result in found.values())


@pytest.mark.parametrize("family", [MIXTRAL, GPT_OSS], ids=lambda family: family.name)
def test_experts_of_other_ranks(family):
    """Under expert parallelism an index of E is an expert that is elsewhere."""
    tokens, index, weights = family.inputs()
    elsewhere = torch.rand(index.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    elsewhere[0] = True
    index = index.masked_fill(elsewhere, EXPERTS)
    block = family.make()
    block._is_expert_parallel = True
    actual = run(swapped_copy(block), (tokens, index, weights))
    assert not actual["out"][0].any()
    assert not actual["argument 2"][elsewhere].any()
    # The same without expert parallelism: a weight of 0 is as good.
    here = family.make()
    kept = (tokens, index.clamp(max=EXPERTS - 1), weights.masked_fill(elsewhere, 0.0))
    plain = run(here, kept)
    exact = run(exact_copy(here), cast(kept, torch.float64))
    for found in (actual, plain, exact):
        found["argument 2"] = found["argument 2"].masked_fill(elsewhere, 0.0)
    assert_parity(actual, plain, exact)


def test_wide_weights_from_the_router():
    """A router in fp32 beside experts in bf16, as DeepSeek-V3 has it."""
    block = MIXTRAL.make(torch.bfloat16)
    tokens, index, weights = MIXTRAL.inputs()
    found = run(swapped_copy(block), (tokens.bfloat16(), index, weights))
    assert found["out"].dtype == torch.bfloat16
    assert found["argument 2"].dtype == torch.float32
    exact = run(exact_copy(block), (tokens.bfloat16().double(), index, weights.double()))
    plain = run(block, (tokens.bfloat16(), index, weights))
    assert_parity(found, plain, exact)


def test_arguments_by_name():
    tokens, index, weights = MIXTRAL.inputs()
    block = swapped_copy(MIXTRAL.make())
    expected = block(tokens, index, weights)
    named = block(tokens, top_k_weights=weights, top_k_index=index)
    assert torch.equal(named, expected)
    block = swapped_copy(GPT_OSS.make())
    expected = block(tokens, index, weights)
    assert torch.equal(block(tokens, router_indices=index, routing_weights=weights), expected)


# The other way in: an experts implementation.


@pytest.fixture
def registered():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    mk.register_with_transformers()
    yield
    del type(ALL_EXPERTS_FUNCTIONS)._global_mapping[experts_module.NAME]


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_as_an_experts_implementation(registered, name):
    family = LANGUAGE_MODELS[name][torch.float32]
    model = family.make()
    inputs = family.inputs(torch.float32, *FEW)
    expected = run(swapped_copy(model), inputs)
    model.model.set_experts_implementation("moe_kernels")
    assert_same_bits(run(model, inputs), expected)
    built = language_model(name, experts_implementation="moe_kernels")
    assert built.config._experts_implementation == "moe_kernels"


def test_an_implementation_that_nobody_registered():
    with pytest.raises(ValueError, match="moe_kernels"):
        language_model("Mixtral", experts_implementation="moe_kernels")


def test_registering_needs_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match="pip install"):
        mk.register_with_transformers()


def test_both_ways_at_once(registered):
    """A swapped model whose config then names the implementation, and back."""
    family = LANGUAGE_MODELS["Mixtral"][torch.float32]
    model = family.make()
    inputs = family.inputs(torch.float32, *FEW)
    before = run(model, inputs)
    mk.apply(model)
    swapped = run(model, inputs)
    model.model.set_experts_implementation("moe_kernels")
    assert_same_bits(run(model, inputs), swapped)
    mk.revert(model)
    assert_same_bits(run(model, inputs), swapped)
    model.model.set_experts_implementation("grouped_mm")
    assert_same_bits(run(model, inputs), before)


# Changes after the swap.


def test_another_activation_is_noticed():
    block = swapped_copy(MIXTRAL.make())
    inputs = MIXTRAL.inputs()
    block.act_fn = nn.GELU()
    original = MIXTRAL.make()
    original.act_fn = nn.GELU()
    exact = run(exact_copy(original), cast(inputs, torch.float64))
    assert_parity(run(block, inputs), run(original, inputs), exact)


def test_generation_goes_on():
    family = LANGUAGE_MODELS["Mixtral"][torch.float32]
    model = family.make().eval()
    prompt = torch.tensor([[3, 5, 7], [2, 9, 4]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.model.generate(prompt, **options)
    mk.apply(model)
    assert torch.equal(model.model.generate(prompt, **options), expected)


# What is not served.


def other_dtype(block):
    block.gate_up_proj = nn.Parameter(block.gate_up_proj.to(torch.int8), requires_grad=False)


def unfitting(block):
    block.down_proj = nn.Parameter(block.down_proj[:, :, :5].clone())


def no_weights(block):
    del block.down_proj


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_dtype, "a weight is torch.int8"),
        (unfitting, "do not fit together"),
        (no_weights, "has no down_proj"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_skipped(change, reason):
    block = MIXTRAL.make()
    change(block)
    original_class = type(block)
    with pytest.raises(mk.NothingMatched, match=reason):
        mk.apply(block)
    assert type(block) is original_class
