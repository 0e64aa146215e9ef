"""Dispatch: copy each token to the rows of its experts."""

from collections.abc import Callable

import torch
from torch import Tensor

import moe_kernels as mk
from benchmarks.entry import CPU, Cost, Inputs, Provider, Run, Shape, Stage
from benchmarks.libraries import transformer_engine
from benchmarks.stages.common import by_backend, generator_on, leaf, normal


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0
) -> Inputs:
    """(T, D) tokens, a token-choice plan for them, and a random gradient of the rows."""
    generator = generator_on(device, seed)
    tokens, hidden_size = shape["T"], shape["D"]
    plan = mk.token_choice(normal(generator, tokens, shape["E"]), shape["K"])
    x = normal(generator, tokens, hidden_size, dtype=dtype)
    rows = normal(generator, plan.num_rows, hidden_size, dtype=dtype)
    return Inputs({"x": x}, {"rows": rows}, {"plan": plan})


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """Indexing, which PyTorch differentiates by scattered additions."""
    return {"rows": inputs.leaves["x"][inputs.fixed["plan"].token_indices.long()]}


def _build(
    gather: Callable[[Tensor, mk.RoutingPlan], Tensor],
) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        x, plan = leaf(inputs.leaves["x"]), inputs.fixed["plan"]
        return Run(lambda: (gather(x, plan),), ("rows",), {"x": [x]})

    return build


def _transformer_engine(inputs: Inputs) -> Run:
    x, plan = leaf(inputs.leaves["x"]), inputs.fixed["plan"]
    permute = transformer_engine.LIBRARY.on(x.device, transformer_engine.permute)
    routing_map = transformer_engine.routing_map_of(plan)
    return Run(lambda: permute(x, routing_map, plan.num_rows)[:1], ("rows",), {"x": [x]})


def _library(backend: str | None) -> Callable[[Inputs], Run]:
    return _build(lambda x, plan: mk.dispatch(x, plan, backend=backend))


def cost(shape: Shape, itemsize: int, mode: str) -> Cost:
    """Tokens read once and rows written once; backward the other way round."""
    tokens, rows = shape["T"] * shape["D"], shape["T"] * shape["K"] * shape["D"]
    one_way = itemsize * (tokens + rows)
    return {
        "forward": Cost(0, one_way),
        "backward": Cost(rows, one_way),
        "both": Cost(rows, 2 * one_way),
    }[mode]


STAGE = Stage(
    make_inputs,
    expected,
    {
        "index_select": Provider(
            _build(lambda x, plan: x.index_select(0, plan.token_indices)), "x.index_select"
        ),
        "transformer_engine": Provider(
            _transformer_engine,
            "TransformerEngine moe_permute, which also makes the row map",
            library=True,
        ),
        "reference": Provider(_library("reference"), "moe_kernels, reference backend"),
        **by_backend(_library),
        "ours": Provider(_library(None), "moe_kernels", kind="ours"),
    },
    cost,
)
