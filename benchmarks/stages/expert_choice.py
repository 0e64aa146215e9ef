"""Expert-choice routing with everything a layer needs: rows, way back, coverage, z-loss."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_kernels as mk
from benchmarks.entry import CPU, Cost, Inputs, Provider, Run, Shape, Stage
from benchmarks.stages.common import (
    by_backend,
    count_tokens,
    generator_on,
    leaf,
    normal,
    rows_of_tokens,
    separated_tokens,
    top_mask,
)

CAPACITY_FACTOR = 2.0
OUTPUTS = (
    "routing_weights",
    "z_loss",
    "token_indices",
    "row_indices",
    "row_offsets",
    "experts_per_token",
)


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0
) -> Inputs:
    """(B·S, E) logits and random gradients of the weights and the z-loss."""
    batch_size, seq_len, experts = shape["B"], shape["S"], shape["E"]
    capacity = mk.expert_capacity(seq_len, experts, CAPACITY_FACTOR)
    generator = generator_on(device, seed)
    logits = separated_tokens(
        normal(generator, batch_size * seq_len, experts, dtype=dtype),
        lambda logits: logits.double().softmax(-1),
        capacity,
        generator,
        num_groups=batch_size,
    )
    upstream = {
        "routing_weights": normal(generator, experts * batch_size * capacity),
        "z_loss": normal(generator),
    }
    return Inputs({"router_logits": logits}, upstream, {"B": batch_size, "C": capacity})


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """Expert after expert and image after image, in the precision of the inputs."""
    logits, batch_size = inputs.leaves["router_logits"], inputs.fixed["B"]
    num_tokens, num_experts = logits.shape
    probs = logits.softmax(-1)
    by_image = probs.view(batch_size, -1, num_experts)
    mask = top_mask(by_image, inputs.fixed["C"], dim=1).view(num_tokens, num_experts)
    tokens = [mask[:, expert].nonzero().flatten() for expert in range(num_experts)]
    token_indices = torch.cat(tokens)
    row_indices, row_offsets = rows_of_tokens(token_indices, num_tokens)
    return {
        "routing_weights": torch.cat([probs[t, expert] for expert, t in enumerate(tokens)]),
        "z_loss": logits.exp().sum(-1).log().square().mean(),
        "token_indices": token_indices,
        "row_indices": row_indices,
        "row_offsets": row_offsets,
        "experts_per_token": mask.sum(-1),
    }


def eager(logits: Tensor, batch_size: int, capacity: int) -> tuple[Tensor, ...]:
    """The lean sequence of PyTorch calls."""
    num_tokens, num_experts = logits.shape
    seq_len = num_tokens // batch_size
    affinity = logits.softmax(-1).view(batch_size, seq_len, num_experts).permute(2, 0, 1)
    chosen = affinity.topk(capacity, dim=-1, sorted=False).indices.sort(-1).values  # (E, B, C)
    start = torch.arange(0, num_tokens, seq_len, device=logits.device).view(-1, 1)
    tokens = (chosen + start).flatten()
    counts = count_tokens(tokens, num_tokens)
    return (
        affinity.gather(-1, chosen).flatten(),
        logits.logsumexp(-1).square().mean(),
        tokens,
        tokens.argsort(stable=True),
        F.pad(counts.cumsum(0), (1, 0)),
        counts,
    )


def tuned(logits: Tensor, batch_size: int, capacity: int) -> tuple[Tensor, ...]:
    """The same for a reader of PyTorch's CPU sources.

    ``topk`` and ``gather`` run over contiguous tokens, the softmax is ``logsumexp`` and ``exp``,
    and a binary search in the sorted tokens counts.
    """
    num_tokens, num_experts = logits.shape
    seq_len = num_tokens // batch_size
    logsumexp = logits.logsumexp(-1)
    affinity = (logits.t() - logsumexp).exp().view(num_experts, batch_size, seq_len)
    chosen = affinity.topk(capacity, dim=-1, sorted=False).indices.sort(-1).values
    start = torch.arange(0, num_tokens, seq_len, device=logits.device).view(-1, 1)
    tokens = (chosen + start).int().flatten()
    ranked, row_indices = tokens.sort(stable=True)
    ends = torch.arange(num_tokens + 1, dtype=torch.int32, device=logits.device)
    offsets = torch.searchsorted(ranked, ends)
    return (
        affinity.gather(-1, chosen).flatten(),
        logsumexp.square().mean(),
        tokens,
        row_indices,
        offsets,
        offsets.diff(),
    )


def minimal(logits: Tensor, batch_size: int, capacity: int) -> tuple[Tensor, ...]:
    """Softmax and ``topk`` alone: no token order, no way back, no loss."""
    affinity = logits.softmax(-1).view(batch_size, -1, logits.shape[1])
    weights, chosen = affinity.topk(capacity, dim=1)  # (B, C, E)
    return weights, chosen


def _ours(
    logits: Tensor, batch_size: int, capacity: int, backend: str | None
) -> tuple[Tensor, ...]:
    plan = mk.expert_choice(logits, capacity=capacity, num_groups=batch_size, backend=backend)
    return (
        plan.routing_weights,
        mk.router_z_loss(plan, backend=backend),
        plan.token_indices,
        plan.row_indices,
        plan.row_offsets,
        plan.experts_per_token,
    )


def _plain(function: Callable[[Tensor, int, int], tuple[Tensor, ...]]) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        logits = leaf(inputs.leaves["router_logits"])
        sizes = inputs.fixed["B"], inputs.fixed["C"]
        return Run(lambda: function(logits, *sizes), OUTPUTS, {"router_logits": [logits]})

    return build


def _minimal(inputs: Inputs) -> Run:
    logits = leaf(inputs.leaves["router_logits"])
    batch_size, capacity = inputs.fixed["B"], inputs.fixed["C"]
    tokens = torch.arange(logits.shape[0], device=logits.device)
    start = tokens.view(batch_size, -1)[:, :1].unsqueeze(-1)

    def canonical(named: dict[str, Tensor]) -> dict[str, Tensor]:
        chosen, order = named["token_indices"].sort(1)
        weights = named["routing_weights"].gather(1, order)
        return {
            "routing_weights": weights.permute(2, 0, 1).flatten(),
            "token_indices": (chosen + start).permute(2, 0, 1).flatten(),
        }

    return Run(
        lambda: minimal(logits, batch_size, capacity),
        ("routing_weights", "token_indices"),
        {"router_logits": [logits]},
        canonical,
    )


def _compiled(inputs: Inputs) -> Run:
    return _plain(torch.compile(eager))(inputs)


def _library(backend: str | None) -> Callable[[Inputs], Run]:
    return _plain(lambda logits, batch_size, capacity: _ours(logits, batch_size, capacity, backend))


def cost(shape: Shape, itemsize: int, mode: str) -> Cost:
    """Logits in, outputs out; backward reads logits and row gradients and writes dlogits."""
    tokens, logits = shape["B"] * shape["S"], shape["B"] * shape["S"] * shape["E"]
    rows = CAPACITY_FACTOR * tokens
    forward = Cost(6 * logits, itemsize * (logits + 3 * rows + 2 * tokens))
    backward = Cost(6 * logits, itemsize * (2 * logits + 2 * rows))
    both = Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "both": both}[mode]


STAGE = Stage(
    make_inputs,
    expected,
    {
        "minimal": Provider(_minimal, "softmax and topk alone, no other output", forward_only=True),
        "eager": Provider(_plain(eager), "softmax, topk, sort, gather, argsort, bincount"),
        "tuned": Provider(_plain(tuned), "the same over contiguous tokens, no softmax"),
        "compiled": Provider(_compiled, "eager under torch.compile", compiled=True),
        "reference": Provider(_library("reference"), "moe_kernels, reference backend"),
        **by_backend(_library),
        "ours": Provider(_library(None), "moe_kernels", kind="ours"),
    },
    cost,
)
