"""Liger-Kernel's ``fused_moe``: expert MLPs in Triton, the gather in the first product.

Read from liger-kernel 0.8.5, ``ops/fused_moe.py``; it is there since 0.7.
"""

from torch import Tensor

from benchmarks.libraries.library import ExpertMLP, Experts, Library


def make() -> ExpertMLP:
    """The autograd function itself."""
    from liger_kernel.ops import LigerFusedMoEFunction

    def experts(x: Tensor, weights: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        out: Tensor = LigerFusedMoEFunction.apply(x, w_in, w_out, chosen, weights)
        return out

    return experts


LIBRARY = Library(
    "Liger-Kernel",
    "liger_kernel",
    "liger-kernel",
    load=make,
    install=('pip install "liger-kernel>=0.7"',),
    experts={"liger": Experts(make, "Liger fused_moe, PyTorch router")},
    extra="bench",
)
