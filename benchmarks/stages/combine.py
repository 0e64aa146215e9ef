"""Combine: the weighted sum of each token's rows, and its gradient for rows and weights."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_kernels as mk
from benchmarks.entry import CPU, Cost, Inputs, Provider, Run, Shape, Stage
from benchmarks.libraries import transformer_engine
from benchmarks.stages.common import by_backend, generator_on, leaf, normal, separated_tokens


def route(shape: Shape, logits: Tensor, backend: str | None = None) -> mk.RoutingPlan:
    """The plan of a shape's router: token choice, or expert choice with factor K."""
    if shape["router"] == "token_choice":
        return mk.token_choice(logits, shape["K"], backend=backend)
    groups = _num_groups(shape)
    return mk.expert_choice(logits, float(shape["K"]), num_groups=groups, backend=backend)


def _num_groups(shape: Shape) -> int:
    return max(1, shape["T"] // 256)


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0
) -> Inputs:
    """(R, D) rows, their weights, and a random gradient of the tokens."""
    generator = generator_on(device, seed)
    tokens, hidden_size = shape["T"], shape["D"]
    groups = 0 if shape["router"] == "token_choice" else _num_groups(shape)
    logits = separated_tokens(
        normal(generator, tokens, shape["E"]),
        lambda logits: logits.double().softmax(-1),
        mk.expert_capacity(tokens // groups, shape["E"], shape["K"]) if groups else shape["K"],
        generator,
        groups,
    )
    plan = route(shape, logits, "reference")
    rows = normal(generator, plan.num_rows, hidden_size, dtype=dtype)
    out = normal(generator, tokens, hidden_size, dtype=dtype)
    leaves = {"rows": rows, "routing_weights": plan.routing_weights}
    return Inputs(leaves, {"out": out}, {"plan": plan, "logits": logits, "shape": shape})


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """One addition after the other, in the precision of the inputs."""
    rows, weights = inputs.leaves["rows"], inputs.leaves["routing_weights"]
    return {"out": index_add(rows, weights, inputs.fixed["plan"])}


def index_add(rows: Tensor, weights: Tensor, plan: mk.RoutingPlan) -> Tensor:
    """Scale every row and add it to its token."""
    out = rows.new_zeros(plan.num_tokens, rows.shape[1])
    return out.index_add(0, plan.token_indices, (rows * weights.unsqueeze(1)).to(rows.dtype))


def gather_sum(rows: Tensor, weights: Tensor, plan: mk.RoutingPlan) -> Tensor:
    """Gather the K rows of each token (token choice only) and add them."""
    assert plan.top_k is not None
    weighted = rows[plan.row_indices] * weights[plan.row_indices].unsqueeze(1)
    return weighted.view(plan.num_tokens, plan.top_k, -1).sum(1).to(rows.dtype)


def embedding_bag(rows: Tensor, weights: Tensor, plan: mk.RoutingPlan) -> Tensor:
    """The gather-sum that PyTorch has as one call."""
    return F.embedding_bag(
        plan.row_indices,
        rows,
        plan.row_offsets,
        mode="sum",
        per_sample_weights=weights[plan.row_indices].to(rows.dtype),
        include_last_offset=True,
    )


def _plain(function: Callable[[Tensor, Tensor, mk.RoutingPlan], Tensor]) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        leaves = {name: [leaf(tensor)] for name, tensor in inputs.leaves.items()}
        rows, weights, plan = leaves["rows"][0], leaves["routing_weights"][0], inputs.fixed["plan"]
        return Run(lambda: (function(rows, weights, plan),), ("out",), leaves)

    return build


def _transformer_engine(inputs: Inputs) -> Run:
    plan, rows = inputs.fixed["plan"], leaf(inputs.leaves["rows"])
    permute = transformer_engine.LIBRARY.on(rows.device, transformer_engine.permute)
    unpermute = transformer_engine.unpermute()
    routing_map = transformer_engine.routing_map_of(plan)
    place = transformer_engine.places_of(plan)
    # Its router gives the weights as (T, E), where the experts without the token have zero.
    weights = torch.zeros_like(routing_map, dtype=torch.float32)
    weights[place] = inputs.leaves["routing_weights"].float()
    weights = leaf(weights)
    shape = (plan.num_tokens, rows.shape[1])
    row_id_map = permute(rows.new_zeros(shape), routing_map, plan.num_rows)[1]

    def canonical(named: dict[str, Tensor]) -> dict[str, Tensor]:
        if "drouting_weights" not in named:
            return named
        return {**named, "drouting_weights": named["drouting_weights"][place]}

    return Run(
        lambda: (unpermute(rows, row_id_map, weights, shape),),
        ("out",),
        {"rows": [rows], "routing_weights": [weights]},
        canonical,
    )


def _library(backend: str | None) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        # A plan of the library's own making: a backend may carry more in it than its fields.
        plan = route(inputs.fixed["shape"], leaf(inputs.fixed["logits"]), backend)
        rows = leaf(inputs.leaves["rows"])
        leaves = {"rows": [rows], "routing_weights": [plan.routing_weights]}
        return Run(lambda: (mk.combine(rows, plan, backend=backend),), ("out",), leaves)

    return build


def cost(shape: Shape, itemsize: int, mode: str) -> Cost:
    """Rows read and tokens written; backward reads both and writes the gradient of the rows."""
    tokens, rows = shape["T"] * shape["D"], shape["T"] * shape["K"] * shape["D"]
    forward = Cost(2 * rows, itemsize * (rows + tokens))
    backward = Cost(3 * rows, itemsize * (2 * rows + tokens))
    both = Cost(5 * rows, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "both": both}[mode]


STAGE = Stage(
    make_inputs,
    expected,
    {
        "index_add": Provider(_plain(index_add), "scaled rows, index_add"),
        "gather_sum": Provider(_plain(gather_sum), "gather by row_indices, scale, sum over K"),
        "embedding_bag": Provider(_plain(embedding_bag), "F.embedding_bag over the rows"),
        "transformer_engine": Provider(
            _transformer_engine, "TransformerEngine moe_unpermute", library=True
        ),
        "reference": Provider(_library("reference"), "moe_kernels, reference backend"),
        **by_backend(_library),
        "ours": Provider(_library(None), "moe_kernels", kind="ours"),
    },
    cost,
)
