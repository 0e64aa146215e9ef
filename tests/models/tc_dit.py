"""TC-DiT's block as the DiffMoE and ProMoE repositories have it (models_TCDiT.py), written from its
description.

DiT-MoE's block (``dit_moe.py``, gate and loss included) under the name ``SparseMoEBlock``, with
experts that are handed in, ``Mlp`` or ``MoeMLP``. DiffMoE calls K ``num_experts_per_tok``, ProMoE
``top_k``; ProMoE has no shared expert for ``n_shared_experts = 0``. In training the results of the
experts are cast to fp32 before they are written to a buffer in the input's dtype, so a module in
another dtype raises; evaluation works in all.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .dit_moe import AddAuxiliaryLoss, MoEGate, MoeMLP


class SparseMoEBlock(nn.Module):
    """(B, S, D) to (B, S, D): routed experts plus shared experts."""

    def __init__(
        self,
        experts: Iterable[nn.Module],
        hidden_dim: int,
        num_experts: int = 16,
        num_experts_per_tok: int = 2,
        n_shared_experts: int = 2,
        name_of_k: str = "num_experts_per_tok",
    ) -> None:
        super().__init__()
        setattr(self, name_of_k, num_experts_per_tok)
        self.experts = nn.ModuleList(experts)
        self.gate = MoEGate(hidden_dim, num_experts, num_experts_per_tok)
        self.n_shared_experts = n_shared_experts
        if n_shared_experts > 0:
            self.shared_experts = MoeMLP(hidden_dim, hidden_dim * n_shared_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        index, weight, loss = self.gate(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.training:
            out = AddAuxiliaryLoss.apply(self._masked(tokens, index, weight), loss)
        else:
            out = self.moe_infer(tokens, index, weight)
        out = out.view_as(hidden_states)
        if self.n_shared_experts > 0:
            out = out + self.shared_experts(hidden_states)
        return out

    def _masked(self, tokens: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        copies = tokens.repeat_interleave(self.gate.top_k, dim=0)
        results = torch.empty_like(copies)
        for e, expert in enumerate(self.experts):
            mine = index.view(-1) == e
            results[mine] = expert(copies[mine]).float()
        return (results.view(*weight.shape, -1) * weight.unsqueeze(-1)).sum(dim=1)

    @torch.no_grad()
    def moe_infer(self, tokens: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            owner, place = torch.where(index == e)
            if len(owner):
                result = expert(tokens[owner]) * weight[owner, place].unsqueeze(1)
                out = out.to(result.dtype).index_add(0, owner, result)
        return out
