"""What every family of swapped blocks has to fulfil.

A test module subclasses ``Numbers``, ``Lifecycle`` and ``Compiled``, with a fixture ``family``.
"""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_kernels as mk
from moe_kernels.integrations.swapped import Swapped

from .blocks import Results, assert_parity
from .contract_compiled import Compiled
from .parity import (
    assert_same_bits,
    cast,
    exact_copy,
    exact_results,
    on_backends,
    original_results,
    random_like,
    run,
    swapped_copy,
)

__all__ = ["Compiled", "Lifecycle", "Numbers"]

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def rounded(found: Results, dtype: torch.dtype) -> Results:
    """Results of autocast, in the dtype of its products."""
    return {name: result.to(dtype) for name, result in found.items()}


class Numbers:
    """Outputs and every gradient, by the rule of twice the original's error."""

    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("served_by", on_backends("reference", "cpu"))
    def test_outputs_and_gradients(self, family, served_by, dtype, training):
        block = family.make(dtype).train(training)
        inputs = family.inputs(dtype)
        actual = run(swapped_copy(block, served_by), inputs)
        plain = original_results(family, block, inputs)
        assert_parity(actual, plain, exact_results(family, block, inputs))

    @pytest.mark.parametrize("served_by", on_backends("triton"))
    def test_outputs_and_gradients_in_the_interpreter(self, family, served_by):
        block = family.make()
        inputs = family.inputs(torch.float32, 1, 5)
        actual = run(swapped_copy(block, served_by), inputs)
        plain = original_results(family, block, inputs)
        assert_parity(actual, plain, exact_results(family, block, inputs))

    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    @pytest.mark.parametrize("dtype", SIXTEEN_BITS)
    def test_autocast(self, family, dtype, training):
        block = family.make().train(training)
        inputs = cast(family.inputs(dtype), torch.float32)
        with torch.autocast("cpu", dtype):
            actual = run(swapped_copy(block), inputs)
            if family.works_under_autocast:
                plain = original_results(family, block, inputs)
        if not family.works_under_autocast:  # as near to it as the original gets
            half = copy.deepcopy(block).to(dtype)
            plain = original_results(family, half, cast(inputs, dtype))
        assert {result.dtype for result in actual.values()} == {torch.float32}
        exact = exact_results(family, block, inputs)
        assert_parity(rounded(actual, dtype), rounded(plain, dtype), exact)

    @pytest.mark.parametrize("shape", [(1, 8), (2, 7), (3, 1)])
    def test_shapes(self, family, shape):
        block = family.make()
        inputs = family.inputs(torch.float32, *shape)
        actual = run(swapped_copy(block), inputs)
        plain = original_results(family, block, inputs)
        assert_parity(actual, plain, exact_results(family, block, inputs))

    def test_strides(self, family):
        block = family.make()
        inputs = family.inputs()
        swapped = swapped_copy(block)
        spread = tuple(t.mT.contiguous().mT if t.dim() > 1 else t for t in inputs)
        assert not spread[0].is_contiguous()
        out = swapped(*inputs)
        row = random_like(out)[..., :1, :]
        upstream = row.expand_as(out)
        assert upstream.stride(-2) == 0
        actual = run(swapped, spread, upstream=upstream)
        plain = run(block, inputs, upstream=upstream)
        exact = run(exact_copy(block), cast(inputs, torch.float64), upstream=upstream)
        assert_parity(actual, plain, exact)

    def test_frozen_parameters(self, family):
        block = family.make()
        inputs = family.inputs()
        swapped = swapped_copy(block)
        everything = run(swapped, inputs)
        names = [name for name, _ in swapped.named_parameters()]
        for keep in (names[::2], names[1::3], names[-1:], []):
            for name, parameter in swapped.named_parameters():
                parameter.requires_grad_(name in keep)
            actual = run(swapped, inputs)
            assert actual.keys() == {
                name for name in everything if name in keep or name not in names
            }
            assert_same_bits(actual, {name: everything[name] for name in actual})

    def test_optimiser_made_before_the_swap(self, family):
        block = family.make()
        inputs = family.inputs()
        exact, plain = exact_copy(block), copy.deepcopy(block)
        trained = {}
        for name, module in (("actual", block), ("plain", plain), ("exact", exact)):
            # With a small eps the first step is the sign of the gradient, also of rounding errors.
            optimiser = torch.optim.AdamW(module.parameters(), lr=0.03, eps=0.1)
            if name == "actual":
                held = [id(p) for p in module.parameters()]
                mk.apply(module)
                assert [id(p) for p in module.parameters()] == held
            arguments = cast(inputs, next(module.parameters()).dtype)
            for step in range(3):
                optimiser.zero_grad(set_to_none=step == 1)
                out = module(*arguments)
                out.backward(random_like(out, step).to(out.dtype))
                optimiser.step()
            trained[name] = {key: p.detach() for key, p in module.named_parameters()}
        trained["start"] = dict(family.make().named_parameters())
        for name, values in trained.items():
            if name != "start":
                trained[name] = {
                    key: v - trained["start"][key].detach() for key, v in values.items()
                }
                trained[name]["out"] = next(iter(trained[name].values()))
        assert all(change.any() for change in trained["plain"].values())
        assert_parity(trained["actual"], trained["plain"], trained["exact"])


class Lifecycle:
    """Whatever happens to a module in its life."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    def test_verify(self, family, training, dtype):
        report = mk.apply(family.make(dtype).train(training), verify=True)
        (row,) = report.rows
        assert row.output_error < 1
        assert (row.gradient_error is None) == (not training and not family.differentiable_in_eval)

    def test_revert(self, family):
        block = family.make()
        original_class, attributes = type(block), dict(block.__dict__)
        inputs = family.inputs()
        before = run(block, inputs)
        mk.apply(block)
        assert type(block) is not original_class
        assert isinstance(block, original_class)
        assert type(block).__name__ == original_class.__name__
        assert mk.revert(block).reverted == [""]
        assert type(block) is original_class
        assert block.__dict__ == attributes
        assert not block._load_state_dict_post_hooks
        assert_same_bits(run(block, inputs), before)
        assert not mk.revert(block).rows

    def test_a_copy_computes_with_its_own_weights(self, family):
        block = family.make()
        inputs = family.inputs()
        mk.apply(block)
        before = run(block, inputs)
        twin = copy.deepcopy(block)
        assert type(twin) is type(block)
        assert_packed_alike(twin, block)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.mul_(1.25)
        assert_same_bits(run(twin, inputs), before)
        changed = run(block, inputs)
        assert not torch.equal(changed["out"], before["out"])

        with torch.no_grad():  # the copy follows, as averaged weights do
            for ours, theirs in zip(twin.parameters(), block.parameters(), strict=True):
                ours.lerp_(theirs, 1.0)
        assert_same_bits(run(twin, inputs), changed)
        assert mk.revert(twin).reverted == [""]
        assert isinstance(block, Swapped)

    @pytest.mark.parametrize("assign", [False, True])
    def test_state_dicts_go_both_ways(self, family, assign):
        original = family.make()
        inputs = family.inputs()
        block = swapped_copy(original)
        expected = run(block, inputs)
        state = block.state_dict()
        assert list(state) == list(original.state_dict())
        for name, value in original.state_dict().items():
            assert torch.equal(state[name], value), name

        blank = family.make()
        with torch.no_grad():
            for parameter in blank.parameters():
                parameter.zero_()
        to_swapped = swapped_copy(blank)
        to_swapped.load_state_dict(original.state_dict(), strict=True, assign=assign)
        assert_packed_alike(to_swapped, block)
        assert_same_bits(run(to_swapped, inputs), expected)
        blank.load_state_dict(state, strict=True, assign=assign)
        assert_same_bits(
            run(blank, inputs, gradients=False), run(original, inputs, gradients=False)
        )

    @pytest.mark.parametrize("how", ["pickle", "torch.save"])
    def test_the_whole_module_is_saved(self, family, how):
        block = family.make()
        inputs = family.inputs()
        mk.apply(block)
        expected = run(block, inputs)
        if how == "pickle":
            back = pickle.loads(pickle.dumps(block))
        else:
            file = io.BytesIO()
            torch.save(block, file)
            file.seek(0)
            back = torch.load(file, weights_only=False)
        assert type(back) is type(block)
        assert_packed_alike(back, block)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.zero_()
        assert_same_bits(run(back, inputs), expected)

    def test_conversions(self, family):
        original = family.make()
        block = swapped_copy(original)
        for convert, dtype in (
            (partial(nn.Module.to, dtype=torch.bfloat16), torch.bfloat16),
            (nn.Module.float, torch.float32),
            (nn.Module.half, torch.float16),
            (nn.Module.double, torch.float64),
        ):
            block = convert(block)
            assert isinstance(block, Swapped)
            fresh = family.make(dtype)  # every dtype so far has these numbers
            inputs = family.inputs(dtype)
            mk.apply(fresh)
            assert_packed_alike(block, fresh)
            assert_same_bits(run(block, inputs), run(fresh, inputs))

    @pytest.mark.parametrize(
        "context", [None, mk.save_routing_context_fn], ids=["all", "selective"]
    )
    def test_activation_checkpointing(self, family, context):
        block = family.make()
        inputs = family.inputs()
        mk.apply(block)
        expected = run(block, inputs)
        options = {} if context is None else {"context_fn": context}

        class Checkpointed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = block

            def forward(self, *args):
                return checkpoint(self.inner, *args, use_reentrant=False, **options)

        actual = run(Checkpointed(), inputs)
        assert_same_bits({name.removeprefix("inner."): v for name, v in actual.items()}, expected)


def assert_packed_alike(block: nn.Module, other: nn.Module) -> None:
    """Weights share memory with each other in one as in the other, in the same order."""
    ours, theirs = (
        [(p.untyped_storage().nbytes(), p.storage_offset()) for p in module.parameters()]
        for module in (block, other)
    )
    assert ours == theirs
