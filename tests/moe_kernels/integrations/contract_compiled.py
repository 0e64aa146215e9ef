"""What every family of swapped blocks has to fulfil under ``torch.compile``."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_kernels as mk

from .blocks import Results, assert_parity
from .parity import exact_results, original_results, run, swapped_copy


class Compiled:
    """Under ``torch.compile``, and wherever a number is asked of the device."""

    @pytest.fixture(autouse=True)
    def poison_uninitialised_memory(self):
        """Not here: ``torch.compile`` cannot look into the patched methods."""

    def test_graph_breaks(self, family):
        block = family.make()
        inputs = family.inputs()
        explained = torch._dynamo.explain(block)(*inputs)
        assert explained.graph_break_count >= family.graph_breaks
        mk.apply(block)
        torch._dynamo.reset()
        explained = torch._dynamo.explain(block)(*inputs)
        assert explained.graph_break_count == 0
        assert explained.graph_count == 1

    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    def test_one_graph_forward_and_backward(self, family, training):
        block = family.make().train(training)
        inputs = family.inputs()
        swapped = swapped_copy(block)
        compiled = torch.compile(swapped, fullgraph=True, backend="aot_eager")
        actual = under_plain_names(run(compiled, inputs))
        plain = original_results(family, block, inputs)
        assert_parity(actual, plain, exact_results(family, block, inputs))

    def test_inductor(self, family):
        block = family.make()
        inputs = family.inputs()
        compiled = torch.compile(swapped_copy(block), fullgraph=True)
        actual = under_plain_names(run(compiled, inputs))
        plain = original_results(family, block, inputs)
        assert_parity(actual, plain, exact_results(family, block, inputs))

    def test_a_model_compiled_before_the_swap_notices_it(self, family):
        block = family.make()
        inputs = family.inputs()
        graphs: list[torch.fx.GraphModule] = []
        compiled = torch.compile(block, backend=partial(keep_graph, graphs))
        compiled(*inputs)
        assert not ops_of_the_kernels(graphs)
        assert mk.apply(compiled).swapped == [""]
        expected = swapped_copy(family.make())(*inputs)
        assert torch.equal(compiled(*inputs), expected)
        assert ops_of_the_kernels(graphs)
        graphs.clear()
        mk.revert(compiled)
        assert torch.equal(compiled(*inputs), block(*inputs))
        assert not ops_of_the_kernels(graphs)

    def test_nothing_is_asked_of_the_device(self, family):
        swapped = swapped_copy(family.make())
        inputs = family.inputs()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(t) for t in inputs]
            assert swapped(*fakes).shape == inputs[0].shape


def under_plain_names(found: Results) -> Results:
    """Without what ``torch.compile`` puts before the names of parameters."""
    return {name.removeprefix("_orig_mod."): result for name, result in found.items()}


def keep_graph(
    graphs: list[torch.fx.GraphModule], graph: torch.fx.GraphModule, inputs: list[Tensor]
) -> Any:
    """A compiler that keeps what it is given, and runs it as it is."""
    graphs.append(graph)
    return graph.forward


def ops_of_the_kernels(graphs: list[torch.fx.GraphModule]) -> set[str]:
    """Ops of this package in these graphs."""
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    return {target for target in targets if "moe_kernels" in target}
