"""Token-choice routing with everything a layer needs: rows, counts, way back, both losses."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_kernels as mk
from benchmarks.entry import CPU, Cost, Inputs, Provider, Run, Shape, Stage
from benchmarks.libraries import transformer_engine
from benchmarks.libraries.library import Router
from benchmarks.stages.common import (
    by_backend,
    count_experts,
    expert_tokens,
    generator_on,
    leaf,
    normal,
    rows_of_tokens,
    separated_tokens,
    top_mask,
)
from benchmarks.stages.skew import load, skewed_logits

OUTPUTS = (
    "routing_weights",
    "load_balance_loss",
    "z_loss",
    "token_indices",
    "expert_offsets",
    "tokens_per_expert",
    "row_indices",
)


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0
) -> Inputs:
    """(T, E) logits and random gradients of the weights and both losses."""
    tokens, experts, top_k = shape["T"], shape["E"], shape["K"]
    skew = shape.get("skew", "uniform")
    generator = generator_on(device, seed)
    logits = normal(generator, tokens, experts, dtype=dtype)
    if skew != "uniform":
        logits = skewed_logits(logits, skew, top_k, generator)
    logits = separated_tokens(logits, lambda logits: logits.double().softmax(-1), top_k, generator)
    upstream = {
        "routing_weights": normal(generator, tokens * top_k),
        "load_balance_loss": normal(generator),
        "z_loss": normal(generator),
    }
    fixed: dict[str, float] = {"K": top_k}
    if "skew" in shape:
        fixed["load"] = load(logits, top_k)
    return Inputs({"router_logits": logits}, upstream, fixed)


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """Expert after expert from a mask, in the precision of the inputs."""
    logits, top_k = inputs.leaves["router_logits"], inputs.fixed["K"]
    num_tokens, num_experts = logits.shape
    probs = logits.softmax(-1)
    chosen = list(expert_tokens(top_mask(probs, top_k, dim=1)))
    counts = torch.tensor([len(tokens) for _, tokens in chosen], device=logits.device)
    token_indices = torch.cat([tokens for _, tokens in chosen])
    share = counts * num_experts / (num_tokens * top_k)
    return {
        "routing_weights": torch.cat([probs[tokens, expert] for expert, tokens in chosen]),
        "load_balance_loss": (share * probs.mean(0)).sum(),
        "z_loss": logits.exp().sum(-1).log().square().mean(),
        "token_indices": token_indices,
        "expert_offsets": F.pad(counts.cumsum(0), (1, 0)),
        "tokens_per_expert": counts,
        "row_indices": rows_of_tokens(token_indices, num_tokens)[0],
    }


def eager(logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """The lean sequence of PyTorch calls; ``row_indices`` in the order of falling weight."""
    num_tokens, num_experts = logits.shape
    probs = logits.softmax(-1)
    weights, experts = probs.topk(top_k, dim=-1)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = count_experts(flat, num_experts)
    row_indices = torch.empty_like(order).scatter_(0, order, _numbers(order))
    return (
        weights.flatten()[order],
        (counts * (num_experts / (num_tokens * top_k)) * probs.mean(0)).sum(),
        logits.logsumexp(-1).square().mean(),
        order // top_k,
        F.pad(counts.cumsum(0), (1, 0)),
        counts,
        row_indices,
    )


def with_router(router: Router, logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """A library's router, its rows sorted and its z-loss computed by PyTorch."""
    weights, experts, counts, load_balance_loss = router(logits, top_k)
    order = experts.flatten().argsort(stable=True)
    return (
        weights.flatten()[order],
        load_balance_loss,
        logits.logsumexp(-1).square().mean(),
        order // top_k,
        F.pad(counts.cumsum(0), (1, 0)),
        counts,
        torch.empty_like(order).scatter_(0, order, _numbers(order)),
    )


def tuned(logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """The same for a reader of PyTorch's CPU sources.

    Over 8 experts ``softmax`` takes several times as long as ``logsumexp`` and ``exp``, a byte
    sorts faster than 8 of them, and in sorted experts a binary search counts.
    """
    num_tokens, num_experts = logits.shape
    logsumexp = logits.logsumexp(-1)
    probs = (logits - logsumexp.unsqueeze(-1)).exp()
    weights, experts = probs.topk(top_k, dim=-1)
    ranked, order = experts.flatten().to(torch.uint8).sort(stable=True)
    experts_and_end = torch.arange(num_experts + 1, dtype=torch.uint8, device=logits.device)
    offsets = torch.searchsorted(ranked, experts_and_end)
    counts = offsets.diff()
    row_indices = torch.empty_like(order).scatter_(0, order, _numbers(order))
    return (
        weights.flatten()[order],
        (counts * (num_experts / (num_tokens * top_k)) * probs.mean(0)).sum(),
        logsumexp.square().mean(),
        order // top_k,
        offsets,
        counts,
        row_indices,
    )


def _numbers(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)


def _ours(logits: Tensor, top_k: int, backend: str | None) -> tuple[Tensor, ...]:
    plan = mk.token_choice(logits, top_k, backend=backend)
    return (
        plan.routing_weights,
        mk.load_balance_loss(plan, backend=backend),
        mk.router_z_loss(plan, backend=backend),
        plan.token_indices,
        plan.expert_offsets,
        plan.tokens_per_expert,
        plan.row_indices,
    )


def _plain(function: Callable[[Tensor, int], tuple[Tensor, ...]]) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        logits, top_k = leaf(inputs.leaves["router_logits"]), inputs.fixed["K"]

        def canonical(named: dict[str, Tensor]) -> dict[str, Tensor]:
            rows = named["row_indices"].view(-1, top_k).sort(-1).values.flatten()
            return {**named, "row_indices": rows}

        return Run(lambda: function(logits, top_k), OUTPUTS, {"router_logits": [logits]}, canonical)

    return build


def _compiled(inputs: Inputs) -> Run:
    return _plain(torch.compile(eager))(inputs)


def _transformer_engine(inputs: Inputs) -> Run:
    device = inputs.leaves["router_logits"].device
    router = transformer_engine.LIBRARY.on(device, transformer_engine.router)
    return _plain(partial(with_router, router))(inputs)


def _library(backend: str | None) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        logits, top_k = leaf(inputs.leaves["router_logits"]), inputs.fixed["K"]
        return Run(lambda: _ours(logits, top_k, backend), OUTPUTS, {"router_logits": [logits]})

    return build


def cost(shape: Shape, itemsize: int, mode: str) -> Cost:
    """Logits in, outputs out; backward reads logits and row gradients and writes dlogits."""
    logits, rows = shape["T"] * shape["E"], shape["T"] * shape["K"]
    forward = Cost(8 * logits, itemsize * (logits + 3 * rows))
    backward = Cost(8 * logits, itemsize * (2 * logits + 3 * rows))
    both = Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "both": both}[mode]


STAGE = Stage(
    make_inputs,
    expected,
    {
        "eager": Provider(_plain(eager), "softmax, topk, stable argsort, bincount, scatter"),
        "tuned": Provider(_plain(tuned), "the same with byte keys, no softmax, searchsorted"),
        "compiled": Provider(_compiled, "eager under torch.compile", compiled=True),
        "transformer_engine": Provider(
            _transformer_engine,
            "TransformerEngine fused router, rows sorted by PyTorch",
            library=True,
        ),
        "reference": Provider(_library("reference"), "moe_kernels, reference backend"),
        **by_backend(_library),
        "ours": Provider(_library(None), "moe_kernels", kind="ours"),
    },
    cost,
)
