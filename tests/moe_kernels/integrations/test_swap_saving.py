"""Swapped models are saved and loaded by whatever their users save and load with.

The weights of a list of experts share one memory after the swap, at different places in it.
"""

import copy

import pytest
import torch
from torch import nn

import moe_kernels as mk
from moe_kernels.testing import ERROR_FLOOR, relative_error

from .contract import assert_packed_alike
from .families import HIDREAM, NUCLEUS
from .parity import assert_same_bits, backend, run, swapped_blocks, swapped_copy
from .whole_models import HIDREAM_MODELS, LANGUAGE_MODELS, NUCLEUS_MODELS

pytest.importorskip("diffusers", reason="the blocks are those of diffusers")
safetensors = pytest.importorskip("safetensors.torch", reason="one of the ways to save")

__all__ = ["backend"]

BLOCKS = pytest.mark.parametrize("family", [HIDREAM, NUCLEUS], ids=lambda family: family.name)
MODELS = pytest.mark.parametrize(
    "family",
    [models[torch.float32] for models in (HIDREAM_MODELS, NUCLEUS_MODELS)],
    ids=lambda family: family.name,
)


def assert_same_state(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        assert torch.equal(actual[name], value), name


# Files.


@BLOCKS
def test_safetensors_of_a_state_dict(family, tmp_path):
    original = family.make()
    block = swapped_copy(original)
    safetensors.save_file(block.state_dict(), tmp_path / "block")
    assert_same_state(safetensors.load_file(tmp_path / "block"), original.state_dict())
    fresh = swapped_copy(family.make().requires_grad_(False).apply(zero))
    fresh.load_state_dict(safetensors.load_file(tmp_path / "block"), assign=True)
    inputs = family.inputs()
    assert_same_bits(run(fresh, inputs, gradients=False), run(block, inputs, gradients=False))


@BLOCKS
def test_safetensors_of_a_model(family, tmp_path):
    original = family.make()
    safetensors.save_model(swapped_copy(original), str(tmp_path / "block"))
    assert_same_state(safetensors.load_file(tmp_path / "block"), original.state_dict())
    fresh = swapped_copy(family.make().apply(zero))
    assert safetensors.load_model(fresh, str(tmp_path / "block")) == (set(), [])
    assert_same_state(fresh.state_dict(), original.state_dict())


@BLOCKS
def test_no_two_entries_of_a_state_dict_share_a_storage(family):
    """Accelerate takes such entries for tied weights, and saves one of them."""

    def storages(state: dict) -> set[int]:
        return {value.untyped_storage().data_ptr() for value in state.values()}

    model = nn.ModuleDict({"a": family.make(), "b": family.make()})
    mk.apply(model)
    state = model.state_dict()
    assert len(storages(state)) == len(state)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())
    # The entries are the weights all the same.
    for name, parameter in model.named_parameters():
        assert state[name].data_ptr() == parameter.data_ptr()
        assert not state[name].requires_grad
    state = model.state_dict(keep_vars=True, prefix="model.")
    for name, parameter in model.named_parameters():
        assert state[f"model.{name}"] is parameter

    mk.revert(model)
    state = {name: parameter.data for name, parameter in model.named_parameters()}
    assert len(storages(state)) == len(state)


@BLOCKS
def test_the_file_of_a_state_dict_is_as_large_as_before(family, tmp_path):
    original = family.make()
    torch.save(original.state_dict(), tmp_path / "before")
    torch.save(swapped_copy(original).state_dict(), tmp_path / "after")
    sizes = [(tmp_path / name).stat().st_size for name in ("before", "after")]
    assert sizes[1] < 1.05 * sizes[0]
    assert_same_state(torch.load(tmp_path / "after", weights_only=True), original.state_dict())


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
@MODELS
def test_diffusers_save_pretrained(family, max_shard_size, tmp_path):
    model = family.make().model
    state = copy.deepcopy(model.state_dict())
    mk.apply(model)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_size == "20KB")
    back = type(model).from_pretrained(tmp_path)
    assert not swapped_blocks(back)
    assert_same_state(back.state_dict(), state)
    assert len(mk.apply(back).swapped) == len(swapped_blocks(model))
    assert_same_state(back.state_dict(), state)


@pytest.mark.parametrize("max_shard_size", ["10GB", "5KB"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_transformers_save_pretrained(name, max_shard_size, tmp_path):
    family = LANGUAGE_MODELS[name][torch.float32]
    model = family.make()
    state = copy.deepcopy(model.state_dict())
    mk.apply(model)
    model.model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    back = type(model.model).from_pretrained(tmp_path)
    assert not swapped_blocks(back)
    assert_same_state({f"model.{key}": value for key, value in back.state_dict().items()}, state)


# The meta device.


@BLOCKS
@pytest.mark.parametrize("assign", [False, True])
def test_swapped_on_the_meta_device_and_loaded_later(family, assign):
    original = family.make()
    inputs = family.inputs()
    block = copy.deepcopy(original).to("meta")
    (row,) = mk.apply(block).rows
    assert row.status == "swapped"
    if not assign:
        block.to_empty(device="cpu")
    block.load_state_dict(original.state_dict(), assign=assign)
    expected = swapped_copy(original)
    assert_packed_alike(block, expected)
    assert_same_bits(run(block, inputs), run(expected, inputs))


def test_the_report_says_that_nothing_is_packed_yet():
    block = HIDREAM.make().to("meta")
    assert "weights are on the meta device" in mk.apply(block).rows[0].detail


def test_functional_calls_with_other_weights():
    block = swapped_copy(HIDREAM.make())
    inputs = HIDREAM.inputs()
    expected = block(*inputs)
    state = {name: value.clone() for name, value in block.state_dict().items()}
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert torch.equal(torch.func.functional_call(block, state, inputs), expected)
    assert not block(*inputs).any()


# Shared weights.


def same_weight(block):
    block.experts[2].w1.weight = block.experts[0].w1.weight


def same_layer(block):
    block.experts[2].w2 = block.experts[0].w2


def same_expert(block):
    block.experts[1] = block.experts[3]


def same_memory(block):
    block.experts[2].w1.weight = nn.Parameter(block.experts[0].w1.weight.data)


@pytest.mark.parametrize(
    "share", [same_weight, same_layer, same_expert, same_memory], ids=lambda f: f.__name__
)
def test_experts_that_share_weights(share):
    original, block = HIDREAM.make(), HIDREAM.make()
    share(original)
    share(block)
    inputs = HIDREAM.inputs()
    names = [name for name, _ in block.named_parameters()]
    pointers = {name: p.data_ptr() for name, p in original.named_parameters(remove_duplicate=False)}
    (row,) = mk.apply(block, verify=True).rows
    assert "stacked at every call, because experts share a weight" in row.detail
    assert [name for name, _ in block.named_parameters()] == names
    now = {name: p.data_ptr() for name, p in block.named_parameters(remove_duplicate=False)}
    for a in pointers:
        for b in pointers:
            assert (now[a] == now[b]) == (pointers[a] == pointers[b]), (a, b)
    actual, plain = run(block, inputs), run(original, inputs)
    assert actual.keys() == plain.keys()
    for name, result in actual.items():
        assert relative_error(result, plain[name]) <= 4 * ERROR_FLOOR[result.dtype], name


def test_a_weight_tied_to_another_module_stays_tied():
    block = HIDREAM.make()
    other = nn.Linear(16, 256, bias=False)
    other.weight = block.experts[1].w3.weight
    mk.apply(block)
    with torch.no_grad():
        other.weight.mul_(2)
    expected = HIDREAM.make()
    with torch.no_grad():
        expected.experts[1].w3.weight.mul_(2)
    inputs = HIDREAM.inputs()
    assert_same_bits(run(block, inputs), run(swapped_copy(expected), inputs))


def test_two_swapped_blocks_with_the_same_experts():
    first, second = HIDREAM.make(), HIDREAM.make()
    second.experts = first.experts
    model = nn.ModuleList([first, second])
    inputs = HIDREAM.inputs()
    expected = [run(swapped_copy(block), inputs) for block in model]
    mk.apply(model)
    for block, wanted in zip(model, expected, strict=True):
        assert_same_bits(run(block, inputs), wanted)
    assert_packed_alike(first, swapped_copy(HIDREAM.make()))


def zero(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.zero_()
