"""``apply`` and ``revert``: what is found, what is told, which backend serves."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import moe_kernels as mk
from moe_kernels.integrations.swapped import Swapped

from .families import HIDREAM, NUCLEUS
from .parity import FAST, assert_same_bits, backend, on_backends, run, swapped_blocks

pytest.importorskip("diffusers", reason="the blocks are those of diffusers")

__all__ = ["backend"]


class Layers(nn.Module):
    """A stack of blocks with something else in between."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return x


def make_layers(count: int = 2) -> Layers:
    return Layers(*(HIDREAM.make() for _ in range(count)))


class OpsCalled(TorchDispatchMode):
    """Names of this package's ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "moe_kernels" in str(func):
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def backends_of(call: Callable[[], object]) -> set[str]:
    """Backends whose expert MLP runs in a call."""
    with OpsCalled() as ops:
        call()
    return {name.rpartition(".")[2] for name in ops.names if ".expert_mlp" in name}


# Finding blocks.


def test_every_block_is_swapped_and_told():
    model = make_layers()
    report = mk.apply(model)
    assert report.swapped == ["layers.0", "layers.1"]
    assert not report.skipped
    assert not report.reverted
    assert len(swapped_blocks(model)) == 2
    row = report.rows[0]
    assert (row.class_name, row.family, row.status) == (
        "MOEFeedForwardSwiGLU",
        "HiDream-I1",
        "swapped",
    )
    assert row.output_error is None


def test_a_second_call_changes_nothing():
    model = make_layers()
    mk.apply(model)
    classes = [type(module) for module in model.modules()]
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    report = mk.apply(model)
    assert [row.status for row in report.rows] == ["already swapped"] * 2
    assert report.swapped == ["layers.0", "layers.1"]
    assert [type(module) for module in model.modules()] == classes
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    hooks = [len(module._load_state_dict_post_hooks) for module in model.layers]
    assert hooks == [1, 1]
    mk.revert(model)
    assert not swapped_blocks(model)
    assert [len(module._load_state_dict_post_hooks) for module in model.layers] == [0, 0]


def test_the_printed_report():
    model = make_layers()
    model.layers[1].experts[0].w1 = nn.Linear(16, 256)
    lines = str(mk.apply(model, "reference")).splitlines()
    assert lines[0] == "moe_kernels (backend reference): 1 swapped, 1 skipped"
    assert lines[1].split() == ["module", "class", "family", "status", "detail"]
    assert lines[2].split()[:4] == ["layers.0", "MOEFeedForwardSwiGLU", "HiDream-I1", "swapped"]
    assert lines[2].endswith("4 experts, top 2, shared expert")
    assert lines[3].endswith("skipped  experts.0.w1 has a bias")
    assert len({line.index("HiDream-I1") for line in lines[2:]}) == 1

    verified = str(mk.apply(model, verify=True)).splitlines()
    assert "output error" in verified[1]
    assert verified[-1].strip() == "errors are in units of the largest error allowed"
    assert "1 reverted" in str(mk.revert(model)).splitlines()[0]
    assert str(mk.revert(model)).startswith("moe_kernels (backend none): no module")
    assert "(the model)" in str(mk.apply(HIDREAM.make()))


def test_one_block_in_two_places():
    block = HIDREAM.make()
    model = Layers(block, block)
    assert mk.apply(model).swapped == ["layers.0"]
    assert model.layers[0] is model.layers[1] is block
    out = model(torch.randn(2, 8, 16))
    out.backward(torch.randn_like(out))
    assert block.experts[0].w1.weight.grad.any()


def test_a_subclass_may_compute_something_else():
    class Twice(type(HIDREAM.make())):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block = HIDREAM.make()
    block.__class__ = Twice
    with pytest.raises(mk.NothingMatched):
        mk.apply(block)
    assert type(block) is Twice


def test_include_and_exclude():
    model = make_layers(3)
    assert mk.apply(model, include="layers.1").swapped == ["layers.1"]
    assert mk.apply(model, exclude=["layers.0", "*.1"]).swapped == ["layers.2"]
    assert [isinstance(layer, Swapped) for layer in model.layers] == [False, True, True]
    assert mk.apply(model, include="layers.?", exclude="layers.[12]").swapped == ["layers.0"]
    with pytest.raises(mk.NothingMatched, match=r"include is 'blocks\.\*' and exclude is None"):
        mk.apply(model, include="blocks.*")


class MixtureOfSomething(nn.Module):
    pass


def test_when_nothing_matches():
    model = nn.Sequential(nn.Linear(4, 4), MixtureOfSomething(), MixtureOfSomething())
    with pytest.raises(mk.NothingMatched) as caught:
        mk.apply(model)
    message = str(caught.value)
    assert "no block of this Sequential was swapped" in message
    assert "MixtureOfSomething x 2" in message
    for name in ("MOEFeedForwardSwiGLU", "NucleusMoELayer", "SparseMoeBlock", "strict=False"):
        assert name in message
    report = mk.apply(model, strict=False)
    assert not report.rows

    with pytest.raises(mk.NothingMatched, match="None of its classes looks like"):
        mk.apply(nn.Linear(4, 4))

    model = make_layers(1)
    del model.layers[0].gate
    with pytest.raises(mk.NothingMatched, match=r"layers\.0 .*skipped|skipped: layers\.0"):
        mk.apply(model)


@pytest.mark.parametrize("call", [mk.apply, mk.revert])
@pytest.mark.parametrize("thing", [3, torch.nn, {"components": {}}, None])
def test_what_is_no_model(call, thing):
    with pytest.raises(TypeError, match=r"expected an nn\.Module or a diffusers pipeline, not a"):
        call(thing)


# Backends.


@pytest.mark.parametrize("name", on_backends("cpu", "triton"))
def test_the_backend_asked_for_serves(name):
    block = NUCLEUS.make()
    inputs = NUCLEUS.inputs(torch.float32, 1, 4)
    mk.apply(block, name)
    assert backends_of(lambda: run(block, inputs)) == {name}
    assert backends_of(lambda: run(copy.deepcopy(block), inputs)) == {name}
    mk.apply(block, "reference")
    assert backends_of(lambda: run(block, inputs)) == set()
    mk.apply(block)
    assert backends_of(lambda: run(block, inputs)) == ({FAST} - {"reference"})


@pytest.mark.parametrize("name", on_backends("cpu", "triton"))
def test_auto_follows_use_backend(name):
    block = HIDREAM.make()
    inputs = HIDREAM.inputs(torch.float32, 1, 4)
    mk.apply(block)
    with mk.use_backend(name):
        assert backends_of(lambda: block(*inputs)) == {name}
    with mk.use_backend("reference"):
        assert backends_of(lambda: block(*inputs)) == set()


def test_an_unknown_backend_is_refused_before_anything_is_touched():
    model = make_layers()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="quick"):
        mk.apply(model, "quick")
    assert [type(module) for module in model.modules()] == before


# Wrappers.


class Pipeline:
    """As diffusers' pipelines are seen from outside."""

    def __init__(self, **components: Any) -> None:
        self.components = components


def test_a_pipeline_with_components():
    model = make_layers()
    pipeline = Pipeline(tokenizer=object(), transformer=model, vae=nn.Linear(2, 2), nothing=None)
    assert mk.apply(pipeline).swapped == ["transformer.layers.0", "transformer.layers.1"]
    assert mk.apply(model, strict=True).rows[0].status == "already swapped"
    assert mk.revert(pipeline).reverted == ["transformer.layers.0", "transformer.layers.1"]
    with pytest.raises(mk.NothingMatched, match="Pipeline"):
        mk.apply(Pipeline(vae=nn.Linear(2, 2)))


def test_a_block_in_two_components():
    block = HIDREAM.make()
    report = mk.apply(Pipeline(transformer=Layers(block), ema=Layers(block)), verify=True)
    assert [row.status for row in report.rows] == ["swapped", "already swapped"]
    assert [row.status for row in mk.revert(Pipeline(a=block, b=block)).rows] == ["reverted"]


def test_a_real_pipeline():
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline

    from .whole_models import hidream_model

    others = {f"{kind}_{n}": None for kind in ("text_encoder", "tokenizer") for n in (2, 3, 4)}
    pipeline = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2),
        text_encoder=None,
        tokenizer=None,
        transformer=hidream_model(),
        **others,
    )
    assert mk.apply(pipeline, verify=True).swapped == [
        "transformer.double_stream_blocks.0.block.ff_i",
        "transformer.single_stream_blocks.0.block.ff_i",
    ]
    assert len(swapped_blocks(pipeline.transformer)) == 2
    assert len(mk.revert(pipeline).reverted) == 2


def test_wrapped_and_compiled_models():
    model = make_layers(1)
    wrapped = nn.DataParallel(model)
    assert mk.apply(wrapped).swapped == ["module.layers.0"]
    compiled = torch.compile(model, backend="eager")
    assert mk.apply(compiled, include="layers.0").rows[0].status == "already swapped"
    assert mk.revert(compiled).reverted == ["layers.0"]
    assert not mk.revert(wrapped).rows


def test_revert_of_a_part():
    model = make_layers()
    x = torch.randn(2, 8, 16)
    before = run(model, (x,))
    mk.apply(model)
    assert mk.revert(model.layers[0]).reverted == [""]
    assert len(swapped_blocks(model)) == 1
    mk.revert(model)
    assert_same_bits(run(model, (x,)), before)
