"""DiffMoE's own block (models_DiffMoE.py of its repository), written from its description.

It shares its class name and most attributes with the EC-DiT block (``diffmoe.py``) and is told
apart by ``capacity_predictor``. Experts choose from all tokens of the batch in training; in
evaluation an expert takes as many tokens as have a predicted capacity above ``expert_threshold``.
Returns the output, the 0/1 selection (B, S, E) and the predicted capacities (B, S, E), the last two
``None`` in evaluation. The running mean of the threshold over ranks is left out here.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SparseMoEBlock(nn.Module):
    """(B, S, D) to a tuple of three."""

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
        self.capacity_predictor = nn.Sequential(
            nn.Linear(hidden_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, num_experts)
        )
        self.register_buffer("expert_threshold", torch.zeros(num_experts))
        self.register_buffer("ema_decay", torch.tensor([0.95]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tokens = x.flatten(0, 1)
        predicted = self.capacity_predictor(tokens.detach())  # (T, E)
        affinity = F.linear(tokens, self.gate_weight).softmax(dim=-1)
        out = torch.zeros_like(tokens)
        selected = torch.zeros_like(affinity)
        for e, expert in enumerate(self.experts):
            if self.training:
                chosen = int((tokens.shape[0] / self.num_experts) * self.capacity)
            else:
                chosen = int((predicted[:, e].sigmoid() > self.expert_threshold[e]).sum())
            weight, index = torch.topk(affinity[:, e], chosen)
            out = out.index_add(0, index, weight.unsqueeze(1) * expert(tokens[index]))
            selected[index, e] = 1
        if not self.training:
            return out.view_as(x), None, None
        by_image = (*x.shape[:2], self.num_experts)
        return out.view_as(x), selected.view(by_image), predicted.view(by_image)
