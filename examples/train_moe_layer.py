"""Build an expert-choice MoE layer and train it to imitate a dense MLP."""

import torch

import moe_kernels as mk

torch.manual_seed(0)
router = mk.ExpertChoiceRouter(hidden_size=64, num_experts=8, capacity_factor=2.0)
layer = mk.MoE(64, 128, num_experts=8, router=router, activation="gelu_tanh")
teacher = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)

for step in range(201):
    x = torch.randn(16, 64, 64)  # (batch_size, seq_len, hidden_size)
    out, plan = layer(x)
    loss = (out - teacher(x).detach()).square().mean()
    (loss + 1e-3 * mk.router_z_loss(plan)).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step:3d}  loss {loss:.4f}  unrouted {plan.stats.unrouted_fraction:.3f}")
