"""moe-ops: permute, grouped products and unpermute in Triton; the activation is PyTorch's.

Read from moe-ops 0.1.0, in the order that its README shows. The number of experts has to be a power
of two (``tl.histogram``), and the order of an expert's rows differs from call to call (atomics).
"""

import torch.nn.functional as F
from torch import Tensor

from benchmarks.libraries.library import ExpertMLP, Experts, Library


def make() -> ExpertMLP:
    """The ops one after the other."""
    from moe_ops import grouped_gemm, permute, unpermute

    def experts(x: Tensor, weights: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        tokens, top_k = chosen.shape
        rows, row_of, offsets = permute(x, chosen, E=w_in.shape[0])
        gate, up = grouped_gemm(rows, w_in, offsets).chunk(2, dim=-1)
        y = grouped_gemm(F.silu(gate) * up, w_out, offsets)
        out: Tensor = unpermute(y, row_of, weights, tokens, top_k)
        return out

    return experts


LIBRARY = Library(
    "moe-ops",
    "moe_ops",
    "moe-ops",
    load=make,
    install=('pip install "moe-ops>=0.1"',),
    experts={"moe_ops": Experts(make, "moe-ops permute and grouped_gemm, PyTorch router")},
    extra="bench",
)
