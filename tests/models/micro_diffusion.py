"""The MoE block of micro-diffusion (github.com/SonyResearch/micro_diffusion, models/dit.py),
written from its description.

Expert choice inside each image: C = int(expert_capacity · S / E), where ``expert_capacity`` is the
factor; softmax over experts, weights as they are; exact GELU, no biases, no shared expert. Both
weights lie transposed against ``nn.Linear``: ``w1`` (E, D, F), ``w2`` (E, F, D); ``gate`` is a
``nn.Linear`` without bias. The constructor fills both with ones; ``custom_init`` is called by the
model.

The one-hot matrix of dispatch and combine is always fp32, so a bf16 or fp16 module raises on its
first product. Under autocast the output is in autocast's dtype, not in that of the input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForwardECMoe(nn.Module):
    """(B, S, D) to (B, S, D)."""

    def __init__(
        self,
        num_experts: int,
        expert_capacity: float,
        dim: int,
        hidden_dim: int,
        multiple_of: int,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.expert_capacity = expert_capacity
        self.dim = dim
        self.hidden_dim = multiple_of * -(-hidden_dim // multiple_of)
        self.w1 = nn.Parameter(torch.ones(num_experts, dim, self.hidden_dim))
        self.w2 = nn.Parameter(torch.ones(num_experts, self.hidden_dim, dim))
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        seq_len = x.shape[1]
        chosen = int(self.expert_capacity * seq_len / self.num_experts)
        probs = F.softmax(self.gate(x), dim=-1)  # (B, S, E)
        weight, index = torch.topk(probs.transpose(1, 2), chosen, dim=-1)  # (B, E, C)
        one_hot = F.one_hot(index, num_classes=seq_len).float()  # (B, E, C, S)
        rows = torch.einsum("becs,bsd->becd", one_hot, x)
        h = self.gelu(torch.einsum("becd,edf->becf", rows, self.w1))
        y = torch.einsum("becf,efd->becd", h, self.w2) * weight.unsqueeze(-1)
        return torch.einsum("becs,becd->bsd", one_hot, y)

    def custom_init(self, init_std: float) -> None:
        """Truncated normal, ``init_std`` for the second matrix."""
        nn.init.trunc_normal_(self.gate.weight, mean=0.0, std=0.02)
        nn.init.trunc_normal_(self.w1, mean=0.0, std=0.02)
        nn.init.trunc_normal_(self.w2, mean=0.0, std=init_std)
