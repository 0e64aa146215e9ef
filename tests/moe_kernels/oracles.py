"""Independent, slow definitions of the stages in plain Python loops, for the tests only."""

import math

import torch
from torch import Tensor


def affinity(logits: Tensor, kind: str) -> Tensor:
    if kind == "softmax":
        return torch.softmax(logits, -1)
    return torch.sigmoid(logits) if kind == "sigmoid" else logits


def choose_tokens(values: list[float], capacity: int) -> list[int]:
    """Indices of the largest values, lower index first on ties, NaN last; sorted by index."""
    key = [-math.inf if math.isnan(v) else v for v in values]
    return sorted(sorted(range(len(key)), key=lambda i: (-key[i], i))[:capacity])


def expert_choice_rows(probs: Tensor, capacity: int, num_groups: int) -> list[tuple[int, int]]:
    """(expert, token) of every row, in the plan's order."""
    tokens, experts = probs.shape
    size = tokens // num_groups
    rows = []
    for expert in range(experts):
        for group in range(num_groups):
            column = probs[group * size : (group + 1) * size, expert].tolist()
            rows += [(expert, group * size + i) for i in choose_tokens(column, capacity)]
    return rows


def token_choice_rows(key: Tensor, top_k: int) -> list[tuple[int, int]]:
    """(expert, token) of every row, in the plan's order."""
    picks = [
        (expert, token)
        for token in range(key.shape[0])
        for expert in choose_tokens(key[token].tolist(), top_k)
    ]
    return sorted(picks)


def moe_output(
    x: Tensor,
    rows: list[tuple[int, int]],
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
) -> Tensor:
    """Expert by expert, token by token, in the precision of the arguments."""
    out = torch.zeros_like(x)
    for r, (expert, token) in enumerate(rows):
        h = w_in[expert] @ x[token]
        if bias_in is not None:
            h = h + bias_in[expert]
        if activation == "swiglu":
            half = h.shape[0] // 2
            a = h[:half] * torch.sigmoid(h[:half]) * h[half:]
        elif activation == "gelu":
            a = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        else:
            a = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        y = w_out[expert] @ a
        if bias_out is not None:
            y = y + bias_out[expert]
        out = out.index_put((torch.tensor([token]),), (weights[r] * y)[None], accumulate=True)
    return out
