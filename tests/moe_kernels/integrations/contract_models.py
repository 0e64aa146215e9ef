"""What whole models have to fulfil, their blocks swapped."""

import pytest
import torch

import moe_kernels as mk

from .blocks import assert_parity
from .parity import assert_same_bits, cast, exact_copy, run, stacked, swapped_blocks, swapped_copy
from .whole_models import calls_of_routers

FEW = 2, 4  # images or texts, and tokens of a text


class WholeModels:
    """A test module subclasses this, with a fixture ``models``: families by dtype."""

    @pytest.mark.parametrize(
        ("dtype", "draws", "training"),
        [(torch.float32, 1, True), (torch.float32, 1, False), (torch.bfloat16, 4, True)],
        ids=["fp32, training", "fp32, evaluation", "bf16, training"],
    )
    def test_outputs_and_gradients(self, models, dtype, draws, training):
        family = models[dtype]
        model = family.make(dtype).train(training)
        gradients = training or family.differentiable_in_eval
        swapped, exact = swapped_copy(model), exact_copy(model)
        actual, plain, right = [], [], []
        for seed in range(draws):
            inputs = family.inputs(dtype, *FEW, seed)
            actual.append(run(swapped, inputs, gradients=gradients))
            plain.append(run(model, inputs, gradients=gradients))
            wide = cast(inputs, torch.float64)
            right.append(run(exact, wide, gradients=gradients))
        assert_parity(stacked(actual), stacked(plain), stacked(right))

    def test_every_layer_is_swapped_and_verified(self, models):
        model = models[torch.float32].make()
        inputs = models[torch.float32].inputs(torch.float32, *FEW)
        with calls_of_routers(model) as calls:
            model(*inputs)
        report = mk.apply(model, verify=True)
        assert len(report.swapped) == len(calls) == 2
        assert len(swapped_blocks(model)) == 2
        assert all(row.output_error < 1 and row.gradient_error < 1 for row in report.rows)

    def test_the_models_own_checkpointing(self, models):
        model = models[torch.float32].make()
        inputs = models[torch.float32].inputs(torch.float32, *FEW)
        mk.apply(model)
        expected = run(model, inputs)
        inner = model.model
        # Of transformers, of older ones, and of diffusers.
        names = (
            "activation_checkpointing_enable",
            "gradient_checkpointing_enable",
            "enable_gradient_checkpointing",
        )
        getattr(inner, next(name for name in names if hasattr(inner, name)))()
        switches = [getattr(module, "gradient_checkpointing", False) for module in inner.modules()]
        assert any(switches)
        assert_same_bits(run(model, inputs), expected)

    def test_one_graph(self, models):
        model = models[torch.float32].make()
        inputs = models[torch.float32].inputs(torch.float32, *FEW)
        explained = torch._dynamo.explain(swapped_copy(model))(*inputs)
        assert explained.graph_break_count == 0
