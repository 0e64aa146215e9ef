"""EC-DiT's block as the DiffMoE and ProMoE repositories have it, written from its description.

Both keep it in models/models_ECDiT.py, word for word the same (github.com/KlingTeam/DiffMoE,
github.com/ali-vilab/ProMoE). Expert choice inside each image: C = int(S / E · capacity), where the
attribute ``capacity`` is the factor; softmax over experts, weights as they are; dispatch and
combine are products with one-hot (B, E, C, S). A training schedule may set ``capacity`` between
steps. Parameters: ``gate_weight`` (E, D), ``experts.{e}.fc1``, ``fc2`` (GELU tanh, with biases) or
``experts.{e}.{gate,up,down}_proj.weight`` (SwiGLU), and with ``n_shared_experts > 0``
``shared_experts``, a SwiGLU of width ``n_shared_experts · hidden_dim``.

In the same repositories ``SparseMoEBlock`` is also the name of two other blocks:

- models_DiffMoE.py: has ``capacity_predictor`` and ``expert_threshold``; chooses from the whole
  batch in training and by a learnt threshold in evaluation; returns a tuple of three. See
  ``diffmoe_batch.py``.
- models_TCDiT.py: token choice; has ``gate`` instead of ``gate_weight``. See ``tc_dit.py``.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dit_moe import MoeMLP


class Mlp(nn.Module):
    """fc1, activation, dropout, norm, fc2, dropout, as in vision transformers."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: type[nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = nn.GELU(approximate="tanh") if act_layer is None else act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden_features, in_features, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(h))


class SparseMoEBlock(nn.Module):
    """(B, S, D) to (B, S, D): experts that choose inside each image, plus shared experts."""

    def __init__(
        self,
        experts: Iterable[nn.Module],
        hidden_dim: int,
        num_experts: int,
        n_shared_experts: int = 0,
        capacity: float = 2,
    ) -> None:
        super().__init__()
        self.gate_weight = nn.Parameter(torch.zeros(num_experts, hidden_dim))
        nn.init.normal_(self.gate_weight, std=0.006)
        self.experts = nn.ModuleList(experts)
        self.capacity = capacity
        self.num_experts = num_experts
        self.n_shared_experts = n_shared_experts
        if n_shared_experts > 0:
            self.shared_experts = MoeMLP(hidden_dim, hidden_dim * n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        seq_len = x.shape[1]
        affinity = F.linear(x, self.gate_weight).softmax(dim=-1).transpose(1, 2)  # (B, E, S)
        chosen = int((seq_len / self.num_experts) * self.capacity)
        weight, index = torch.topk(affinity, k=chosen, dim=-1, sorted=False)  # (B, E, C)
        one_hot = F.one_hot(index, num_classes=seq_len).to(x)  # (B, E, C, S)
        rows = torch.einsum("becs,bsd->becd", one_hot, x)
        outs = [expert(rows[:, e]) for e, expert in enumerate(self.experts)]
        out = torch.einsum("becs,bec,becd->bsd", one_hot, weight, torch.stack(outs, dim=1))
        if self.n_shared_experts > 0:
            out = out + self.shared_experts(x)
        return out
