"""SonicMoE: expert MLPs in CuTe DSL on QuACK's products, for Hopper and Blackwell.

Read from sonic-moe 0.1.2.post1, ``functional/__init__.py``. Its metadata pins torch to 2.9.1 at
most and CuTe DSL to 4.4.2, which the commands below keep to without touching torch.
"""

import torch
from torch import Tensor

from benchmarks.libraries.library import ExpertMLP, Experts, Library


def make() -> ExpertMLP:
    """The entry for rows that any router chose."""
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    def experts(x: Tensor, weights: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        tokens, top_k = chosen.shape
        numbers = torch.arange(tokens, dtype=torch.int32, device=x.device)
        out: Tensor = moe_general_routing_inputs(
            x,
            weights.flatten(),
            numbers.repeat_interleave(top_k, output_size=tokens * top_k),  # ascending
            chosen.flatten(),
            w_in.permute(1, 2, 0),  # (2F, D, E)
            None,
            w_out.permute(1, 2, 0),  # (D, F, E)
            None,
            E=w_in.shape[0],
            stream_id=torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0,
            activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,  # the gate half first, not interleaved
        )[0]
        return out

    return experts


LIBRARY = Library(
    "SonicMoE",
    "sonicmoe",
    "sonic-moe",
    load=make,
    install=(
        'pip install "quack-kernels==0.3.11" "nvidia-cutlass-dsl==4.4.2"  # Python >= 3.12',
        "pip install --no-deps sonic-moe==0.1.2.post1",
    ),
    experts={"sonicmoe": Experts(make, "SonicMoE with QuACK, PyTorch router")},
    capability=(9, 0),
)
