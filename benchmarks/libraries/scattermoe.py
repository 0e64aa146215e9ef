"""ScatterMoE: grouped products in Triton that read scattered rows and write them back scattered.

Read from github.com/shawntan/scattermoe at 2d15f31 (0.3.0), ``parallel_experts.py``. Its ``GLUMLP``
takes the second half as the gate, so its two products are called here with this project's order.
"""

import torch.nn.functional as F
from torch import Tensor

from benchmarks.libraries.library import ExpertMLP, Experts, Library


def make() -> ExpertMLP:
    """Sort and count, both products, weights applied by the second."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    def experts(x: Tensor, weights: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        order = flatten_sort_count(chosen, num_experts=w_in.shape[0])
        hidden = parallel_linear(
            x, w_in.permute(0, 2, 1), chosen.shape[1], *order, grouped_out=True
        )
        gate, up = hidden.chunk(2, dim=-1)
        # The weights are a factor of a matrix product there, which wants one dtype.
        out: Tensor = parallel_linear(
            F.silu(gate) * up,
            w_out.permute(0, 2, 1),
            1,
            *order,
            gates=weights.to(x.dtype),
            grouped_in=True,
        )
        return out

    return experts


LIBRARY = Library(
    "ScatterMoE",
    "scattermoe",
    "scattermoe",
    load=make,
    install=("pip install --no-deps git+https://github.com/shawntan/scattermoe",),
    experts={"scattermoe": Experts(make, "ScatterMoE parallel_linear, PyTorch router")},
)
