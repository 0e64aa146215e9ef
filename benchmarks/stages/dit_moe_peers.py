"""Plain PyTorch ways of running a DiT-MoE layer: the usual loop, a good one, grouped products.

Each returns the output and, when gradients are on, the load-balance loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SwiGLU = tuple[Tensor, Tensor, Tensor]  # gate, up and down matrices


def published(
    x: Tensor, router: Tensor, experts: list[SwiGLU], shared: SwiGLU, top_k: int
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
    out = y.view_as(x) + _swiglu(x, shared)
    if not torch.is_grad_enabled():
        return (out,)
    share = F.one_hot(chosen, len(experts)).float().mean(0) * len(experts)
    return out, (share * probs.mean(0)).sum()


def _swiglu(x: Tensor, expert: SwiGLU) -> Tensor:
    gate, up, down = expert
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def good_eager(
    x: Tensor,
    router: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    shared_in: Tensor,
    shared_out: Tensor,
    top_k: int,
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
    shared = _fused_swiglu(flat, shared_in, shared_out)
    out = shared.index_add(0, tokens, weighted).view_as(x)
    return _with_loss(out, probs, counts, top_k)


def grouped(
    x: Tensor,
    router: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    shared_in: Tensor,
    shared_out: Tensor,
    top_k: int,
) -> tuple[Tensor, ...]:
    """Sort by expert once, all experts in one ``F.grouped_mm`` for each projection."""
    flat = x.view(-1, x.shape[-1])
    probs, order, counts, weights = _route(flat, router, top_k)
    tokens, offsets = order // top_k, counts.cumsum(0).int()
    gate, up = F.grouped_mm(flat[tokens], w_in.mT, offs=offsets).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, w_out.mT, offs=offsets)
    weighted = (y * weights.unsqueeze(1)).to(x.dtype)
    shared = _fused_swiglu(flat, shared_in, shared_out)
    out = shared.index_add(0, tokens, weighted).view_as(x)
    return _with_loss(out, probs, counts, top_k)


def _route(flat: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Affinities, the stable order by expert, tokens of each expert, weights in that order."""
    probs = F.linear(flat.float(), router.float()).softmax(dim=-1)
    weights, experts = probs.topk(top_k, dim=-1)
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=probs.shape[1])
    return probs, order, counts, weights.flatten()[order]


def _fused_swiglu(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    gate, up = F.linear(x, w_in).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w_out)


def _with_loss(out: Tensor, probs: Tensor, counts: Tensor, top_k: int) -> tuple[Tensor, ...]:
    if not torch.is_grad_enabled():
        return (out,)
    share = counts * (probs.shape[1] / (top_k * probs.shape[0]))
    return out, (share * probs.mean(0)).sum()
