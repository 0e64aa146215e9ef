"""Plain PyTorch ways of running a DiT-MoE layer: the usual loop, a good one, grouped products.

Each returns the output and, when gradients are on, the load-balance loss. ``shared`` holds the two
matrices of a shared expert, or nothing.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.libraries import ExpertMLP
from benchmarks.stages.common import count_experts

SwiGLU = tuple[Tensor, ...]  # gate, up and down matrices
Shared = tuple[Tensor, ...]  # both first matrices as one, and the second; or empty

# PyTorch 2.9 has it under its private name only.
_grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


def published(
    x: Tensor, router: Tensor, experts: Sequence[SwiGLU], shared: SwiGLU | None, top_k: int
) -> tuple[Tensor, ...]:
    """Copy every token K times, run each expert on its boolean mask, weight, sum over K."""
    flat = x.view(-1, x.shape[-1])
    probs = F.linear(flat.float(), router.float()).softmax(dim=-1)
    weights, indices = probs.topk(top_k, dim=-1)
    chosen = indices.view(-1)
    copies = flat.repeat_interleave(top_k, dim=0)
    y = torch.empty_like(copies)
    for number, expert in enumerate(experts):
        mask = chosen == number
        y[mask] = _swiglu(copies[mask], expert)
    y = (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)
    out = y.view_as(x) if shared is None else y.view_as(x) + _swiglu(x, shared)
    if not torch.is_grad_enabled():
        return (out,)
    share = F.one_hot(chosen, len(experts)).float().mean(0) * len(experts)
    return out, (share * probs.mean(0)).sum()


def _swiglu(x: Tensor, expert: SwiGLU) -> Tensor:
    gate, up, down = expert
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def good_eager(
    x: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor, shared: Shared, top_k: int
) -> tuple[Tensor, ...]:
    """Sort by expert once, run each expert on a slice, add the weighted rows to the tokens.

    ``w.unbind(0)`` and not ``w[e]``: the gradient of each ``w[e]`` is a full-size tensor of zeros
    around one expert.
    """
    flat = x.view(-1, x.shape[-1])
    probs, order, counts, weights = _route(flat, router, top_k)
    tokens = order // top_k
    outputs = [
        _fused_swiglu(rows, into, out)
        for rows, into, out in zip(
            flat[tokens].split(counts.tolist()), w_in.unbind(0), w_out.unbind(0), strict=True
        )
    ]
    weighted = (torch.cat(outputs) * weights.unsqueeze(1)).to(x.dtype)
    out = _shared(flat, shared).index_add(0, tokens, weighted).view_as(x)
    return _with_loss(out, probs, counts, top_k)


def grouped(
    x: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor, shared: Shared, top_k: int
) -> tuple[Tensor, ...]:
    """Sort by expert once, all experts in one ``F.grouped_mm`` for each projection."""
    flat = x.view(-1, x.shape[-1])
    probs, order, counts, weights = _route(flat, router, top_k)
    tokens = order // top_k
    y = _grouped_experts(flat[tokens], counts, w_in, w_out)
    weighted = (y * weights.unsqueeze(1)).to(x.dtype)
    out = _shared(flat, shared).index_add(0, tokens, weighted).view_as(x)
    return _with_loss(out, probs, counts, top_k)


def grouped_permute(
    x: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor, shared: Shared, top_k: int
) -> tuple[Tensor, ...]:
    """As ``grouped``, but rows are gathered back into token order and summed: no atomics."""
    flat = x.view(-1, x.shape[-1])
    probs, order, counts, weights = _route(flat, router, top_k)
    y = _grouped_experts(flat[order // top_k], counts, w_in, w_out)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    weighted = (y[place] * weights[place].unsqueeze(1)).view(-1, top_k, x.shape[-1])
    out = weighted.sum(dim=1).to(x.dtype)
    if shared:
        out = out + _fused_swiglu(flat, *shared)
    return _with_loss(out.view_as(x), probs, counts, top_k)


def with_experts(
    experts: ExpertMLP,
    x: Tensor,
    router: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    shared: Shared,
    top_k: int,
) -> tuple[Tensor, ...]:
    """PyTorch's router in front of a library's expert MLP."""
    flat = x.view(-1, x.shape[-1])
    probs = F.linear(flat.float(), router.float()).softmax(dim=-1)
    weights, chosen = probs.topk(top_k, dim=-1)
    out = experts(flat, weights, chosen.int(), w_in, w_out)
    if shared:
        out = out + _fused_swiglu(flat, *shared)
    out = out.view_as(x)
    if not torch.is_grad_enabled():
        return (out,)  # without counting: the library has counts of its own
    return _with_loss(out, probs, count_experts(chosen.flatten(), probs.shape[1]), top_k)


def _route(flat: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Affinities, the stable order by expert, tokens of each expert, weights in that order."""
    probs = F.linear(flat.float(), router.float()).softmax(dim=-1)
    weights, experts = probs.topk(top_k, dim=-1)
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)
    return probs, order, count_experts(chosen, probs.shape[1]), weights.flatten()[order]


def _grouped_experts(rows: Tensor, counts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    offsets = counts.cumsum(0).int()
    gate, up = _grouped_mm(rows, w_in.mT, offs=offsets).chunk(2, dim=-1)
    return _grouped_mm(F.silu(gate) * up, w_out.mT, offs=offsets)


def _shared(flat: Tensor, shared: Shared) -> Tensor:
    return _fused_swiglu(flat, *shared) if shared else torch.zeros_like(flat)


def _fused_swiglu(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    gate, up = F.linear(x, w_in).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w_out)


def _with_loss(out: Tensor, probs: Tensor, counts: Tensor, top_k: int) -> tuple[Tensor, ...]:
    if not torch.is_grad_enabled():
        return (out,)
    share = counts * (probs.shape[1] / (top_k * probs.shape[0]))
    return out, (share * probs.mean(0)).sum()
