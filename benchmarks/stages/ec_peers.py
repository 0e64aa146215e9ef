"""Plain PyTorch ways of running an expert-choice layer: one-hot products, and a good gather."""

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot(
    x: Tensor,
    router: Tensor,
    w_in: Tensor,
    bias_in: Tensor,
    w_out: Tensor,
    bias_out: Tensor,
    capacity: int,
) -> Tensor:
    """Dispatch and combine are products with the one-hot (B, E, C, S) selection."""
    affinity = F.linear(x.float(), router.float()).softmax(dim=-1)  # (B, S, E)
    weights, indices = affinity.mT.topk(capacity, dim=-1)  # (B, E, C)
    selection = F.one_hot(indices, x.shape[1]).to(x.dtype)
    rows = torch.einsum("becs,bsd->ebcd", selection, x)
    y = _experts(rows, w_in, bias_in, w_out, bias_out)
    return torch.einsum("becs,bec,ebcd->bsd", selection, weights.to(x.dtype), y)


def good_eager(
    x: Tensor,
    router: Tensor,
    w_in: Tensor,
    bias_in: Tensor,
    w_out: Tensor,
    bias_out: Tensor,
    capacity: int,
) -> Tensor:
    """Gather the chosen tokens, run all experts as batched products, add the rows back."""
    batch_size, seq_len, hidden_size = x.shape
    affinity = F.linear(x.float(), router.float()).softmax(dim=-1).permute(2, 0, 1)  # (E, B, S)
    weights, chosen = affinity.topk(capacity, dim=-1)  # (E, B, C)
    start = torch.arange(0, batch_size * seq_len, seq_len, device=x.device).view(1, -1, 1)
    tokens = (chosen + start).flatten()
    flat = x.view(-1, hidden_size)
    rows = flat.index_select(0, tokens).view(*chosen.shape, hidden_size)
    y = _experts(rows, w_in, bias_in, w_out, bias_out)
    weighted = (y * weights.unsqueeze(-1)).to(x.dtype).view(-1, hidden_size)
    return torch.zeros_like(flat).index_add(0, tokens, weighted).view_as(x)


def _experts(
    rows: Tensor, w_in: Tensor, bias_in: Tensor, w_out: Tensor, bias_out: Tensor
) -> Tensor:
    """(E, B, C, D) rows through the experts' MLPs."""
    flat = rows.flatten(1, 2)
    h = F.gelu(torch.baddbmm(bias_in.unsqueeze(1), flat, w_in.mT), approximate="tanh")
    return torch.baddbmm(bias_out.unsqueeze(1), h, w_out.mT).view(rows.shape)
