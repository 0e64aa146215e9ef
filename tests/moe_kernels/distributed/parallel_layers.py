"""What the tests of expert parallelism share: a small layer, random numbers, errors."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import moe_kernels as mk

HIDDEN, EXPERTS, SEQ = 16, 8, 6
# What every rank sends in the gradients of a test: a sum would hide errors.
DOUT_SEED = 2


def make_layer(router: str, **options: Any) -> mk.MoE:
    """A fp64 layer with the same random weights wherever it is made."""
    torch.manual_seed(3)
    sizes = (HIDDEN, EXPERTS)
    chooser: mk.LinearRouter
    if router == "expert_choice":
        chooser = mk.ExpertChoiceRouter(*sizes, 2.0, check_finite=False)
    else:
        chooser = mk.TokenChoiceRouter(*sizes, 2, normalize="per_token", check_finite=False)
    settings: dict[str, Any] = {"bias": True, "shared_intermediate_size": 24, **options}
    layer = mk.MoE(HIDDEN, 24, EXPERTS, chooser, **settings).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def numbers(*shape: int, seed: int) -> Tensor:
    """Normal fp64 numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest error, in units of the largest number expected."""
    if not expected.numel():
        return 0.0
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def expert_mesh() -> DeviceMesh:
    """All ranks, as owners of experts."""
    size = torch.distributed.get_world_size()
    # A rank that sends nothing could end while others still connect to it.
    torch.distributed.barrier()
    return init_device_mesh("cpu", (size,), mesh_dim_names=("expert",))


def gradients(layer: torch.nn.Module) -> dict[str, Tensor]:
    """Whole gradients, summed over the ranks."""
    found = {}
    for name, parameter in layer.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        if isinstance(gradient, DTensor):
            found[name] = gradient.full_tensor()
        else:
            found[name] = gradient.clone()
            torch.distributed.all_reduce(found[name])
    return found


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error of all tensors."""
    assert found.keys() == expected.keys()
    return max(relative(found[name], expected[name]) for name in found)
