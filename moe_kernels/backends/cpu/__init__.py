"""C++ kernels with OpenMP (``csrc/cpu``): the ops' CPU kernels, and how the stages call the ops."""

from moe_kernels.backends.cpu import products
from moe_kernels.backends.cpu.activation import activation
from moe_kernels.backends.cpu.experts import expert_mlp, grouped_gemm
from moe_kernels.backends.cpu.losses import (
    load_balance_loss,
    router_similarity_loss,
    router_z_loss,
)
from moe_kernels.backends.cpu.route import expert_choice, router_probs, token_choice
from moe_kernels.backends.cpu.rows import combine, dispatch

IMPLEMENTATIONS = {
    "expert_choice": expert_choice,
    "token_choice": token_choice,
    "router_probs": router_probs,
    "dispatch": dispatch,
    "grouped_gemm": grouped_gemm,
    "expert_mlp": expert_mlp,
    "activation": activation,
    "combine": combine,
    "load_balance_loss": load_balance_loss,
    "router_z_loss": router_z_loss,
    "router_similarity_loss": router_similarity_loss,
}

# For the backends table.
describe = products.describe
