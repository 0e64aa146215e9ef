"""The specification in plain PyTorch: runs on every device, differentiable, deterministic.

Ties go to the lower token (or expert) index, NaN ranks with -inf, a token without rows gets
exactly 0, an expert without rows gets a zero weight gradient. Routing, weighting and sums are in
fp32 (fp64 for fp64 input) whatever the dtype of the tokens.
"""

from moe_kernels.backends.reference.affinity import compute_affinity
from moe_kernels.backends.reference.combine import combine
from moe_kernels.backends.reference.dispatch import dispatch
from moe_kernels.backends.reference.expert_choice import expert_choice
from moe_kernels.backends.reference.expert_mlp import activate, expert_mlp
from moe_kernels.backends.reference.grouped_gemm import grouped_gemm
from moe_kernels.backends.reference.losses import (
    load_balance_loss,
    router_similarity_loss,
    router_z_loss,
)
from moe_kernels.backends.reference.token_choice import token_choice

IMPLEMENTATIONS = {
    "expert_choice": expert_choice,
    "token_choice": token_choice,
    "router_probs": compute_affinity,
    "dispatch": dispatch,
    "grouped_gemm": grouped_gemm,
    "expert_mlp": expert_mlp,
    "activation": activate,
    "combine": combine,
    "load_balance_loss": load_balance_loss,
    "router_z_loss": router_z_loss,
    "router_similarity_loss": router_similarity_loss,
}
