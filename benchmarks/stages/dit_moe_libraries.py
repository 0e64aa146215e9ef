"""Other libraries' expert MLPs behind one signature, imported when an entry asks for them.

Each maps (T, D) tokens, the (T, K) weights in fp32 and experts in int32 that PyTorch's router
chose, and both stacked matrices (gate half first) to (T, D).
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ExpertMLP = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def liger() -> ExpertMLP:
    """Liger's ``fused_moe``, since liger-kernel 0.7."""
    from liger_kernel.ops import LigerFusedMoEFunction

    def experts(x: Tensor, weights: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        out: Tensor = LigerFusedMoEFunction.apply(x, w_in, w_out, chosen, weights)
        return out

    return experts


def moe_ops() -> ExpertMLP:
    """The ops of moe-ops 0.1 in the order that its README shows; the activation is PyTorch's."""
    from moe_ops import grouped_gemm, permute, unpermute

    def experts(x: Tensor, weights: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        tokens, top_k = chosen.shape
        rows, row_of, offsets = permute(x, chosen, E=w_in.shape[0])
        gate, up = grouped_gemm(rows, w_in, offsets).chunk(2, dim=-1)
        y = grouped_gemm(F.silu(gate) * up, w_out, offsets)
        out: Tensor = unpermute(y, row_of, weights, tokens, top_k)
        return out

    return experts


EXPERTS: dict[str, Callable[[], ExpertMLP]] = {"liger": liger, "moe_ops": moe_ops}
