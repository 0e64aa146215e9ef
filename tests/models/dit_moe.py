"""The MoE block of DiT-MoE (github.com/feizc/DiT-MoE, models.py), written from its description.

Token choice with softmax over experts, weights as they are (``norm_topk_prob`` is off), SwiGLU
experts without biases, and a shared expert of width ``n_shared_experts · embed_dim`` that every
token passes. Parameters: ``gate.weight`` (E, D), ``experts.{e}.{gate,up,down}_proj.weight``,
``shared_experts.{gate,up,down}_proj.weight``.

Kept as they are in the original, because users meet them:

- In training each token is repeated K times and experts write to boolean masks of the copies; the
  buffer has the input's dtype, so autocast raises on the first expert.
- ``AddAuxiliaryLoss`` gives the balance loss the gradient 1, whatever the scale of the loss that is
  differentiated. ``alpha = 0`` in training raises, because there is then no loss to add.
- In evaluation the routed experts run without gradient: only the shared expert has one.
- The weights of an expert are cut into ``pretraining_tp`` slices of equal width; channels that
  remain are left out.
- Logits and softmax are in the dtype of the input.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MoEGate(nn.Module):
    """Router: (B, S, D) to the experts (T, K) and weights (T, K) of each token, and the loss."""

    def __init__(
        self,
        embed_dim: int,
        num_experts: int = 16,
        num_experts_per_tok: int = 2,
        aux_loss_alpha: float = 0.01,
    ) -> None:
        super().__init__()
        self.top_k = num_experts_per_tok
        self.n_routed_experts = num_experts
        self.scoring_func = "softmax"
        self.alpha = aux_loss_alpha
        self.seq_aux = False
        self.norm_topk_prob = False
        self.gating_dim = embed_dim
        self.weight = nn.Parameter(torch.zeros(num_experts, embed_dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        batch_size, _, hidden_size = hidden_states.shape
        if self.scoring_func != "softmax":
            raise NotImplementedError(self.scoring_func)
        scores = F.linear(hidden_states.reshape(-1, hidden_size), self.weight).softmax(dim=-1)
        weight, index = torch.topk(scores, self.top_k, dim=-1, sorted=False)
        if self.norm_topk_prob and self.top_k > 1:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        loss = None
        if self.training and self.alpha > 0:
            loss = self._balance_loss(scores, index, batch_size) * self.alpha
        return index, weight, loss

    def _balance_loss(self, scores: Tensor, index: Tensor, batch_size: int) -> Tensor:
        """sum_e f_e P_e over the batch, or with ``seq_aux`` the mean of the same over images."""
        experts = self.n_routed_experts
        pools = batch_size if self.seq_aux else 1
        chosen = F.one_hot(index.view(pools, -1), experts).float()  # (pools, tokens·K, E)
        frequency = chosen.mean(dim=1) * experts
        mean_score = scores.view(pools, -1, experts).mean(dim=1)
        return (frequency * mean_score).sum(dim=1).mean()


class AddAuxiliaryLoss(torch.autograd.Function):
    """Returns x; in backward the loss gets the gradient 1."""

    @staticmethod
    def forward(ctx, x, loss):
        assert loss.numel() == 1
        ctx.dtype = loss.dtype
        ctx.wanted = loss.requires_grad
        return x

    @staticmethod
    def backward(ctx, grad_output):
        one = torch.ones(1, dtype=ctx.dtype, device=grad_output.device) if ctx.wanted else None
        return grad_output, one


class MoeMLP(nn.Module):
    """SwiGLU without biases, computed slice by slice."""

    def __init__(self, hidden_size: int, intermediate_size: int, pretraining_tp: int = 2) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = nn.SiLU()
        self.pretraining_tp = pretraining_tp

    def forward(self, x: Tensor) -> Tensor:
        if self.pretraining_tp <= 1:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        width = self.intermediate_size // self.pretraining_tp
        out = None
        for start in range(0, width * self.pretraining_tp, width):
            channels = slice(start, start + width)
            gate = F.linear(x, self.gate_proj.weight[channels])
            up = F.linear(x, self.up_proj.weight[channels])
            part = F.linear(self.act_fn(gate) * up, self.down_proj.weight[:, channels])
            out = part if out is None else out + part
        return out


class SparseMoeBlock(nn.Module):
    """(B, S, D) to (B, S, D): routed experts plus shared experts."""

    def __init__(
        self,
        embed_dim: int,
        mlp_ratio: int = 4,
        num_experts: int = 16,
        num_experts_per_tok: int = 2,
        n_shared_experts: int | None = 2,
    ) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.experts = nn.ModuleList(
            MoeMLP(embed_dim, mlp_ratio * embed_dim) for _ in range(num_experts)
        )
        self.gate = MoEGate(embed_dim, num_experts, num_experts_per_tok)
        self.n_shared_experts = n_shared_experts
        if n_shared_experts is not None:
            self.shared_experts = MoeMLP(embed_dim, embed_dim * n_shared_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        index, weight, loss = self.gate(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.training:
            out = self._masked(tokens, index, weight).view_as(hidden_states)
            out = AddAuxiliaryLoss.apply(out, loss)
        else:
            out = self.moe_infer(tokens, index.view(-1), weight.view(-1, 1)).view_as(hidden_states)
        if self.n_shared_experts is not None:
            out = out + self.shared_experts(hidden_states)
        return out

    def _masked(self, tokens: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        copies = tokens.repeat_interleave(self.num_experts_per_tok, dim=0)
        results = torch.empty_like(copies)
        for e, expert in enumerate(self.experts):
            mine = index.view(-1) == e
            results[mine] = expert(copies[mine])
        return (results.view(*weight.shape, -1) * weight.unsqueeze(-1)).sum(dim=1)

    @torch.no_grad()
    def moe_infer(self, tokens: Tensor, flat_index: Tensor, flat_weight: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        by_expert = flat_index.argsort()
        ends = flat_index.bincount().cpu().numpy().cumsum(0)
        start = 0
        for expert, end in zip(self.experts, ends, strict=False):  # no counts after the last used
            if end > start:
                rows = by_expert[start:end]
                owner = rows // self.num_experts_per_tok
                result = expert(tokens[owner]).mul_(flat_weight[rows])
                places = owner.unsqueeze(1).expand(-1, tokens.shape[1])
                out.scatter_reduce_(0, places, result, reduce="sum")
            start = end
        return out
