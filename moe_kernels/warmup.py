"""Compile a model's kernels before the first step, and measure tile sizes if asked to."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels.backends import serving
from moe_kernels.layers import MoE
from moe_kernels.losses import load_balance_loss
from moe_kernels.plan import RoutingPlan


@dataclass
class WarmupReport:
    """What ``warmup`` did.

    Attributes:
        layers: names of the layers that were run; equal layers are run once.
        seconds: how long it took, compiling included.
        tuned: a line for each product whose tile sizes were replaced by faster ones.
    """

    layers: list[str] = field(default_factory=list)
    seconds: float = 0.0
    tuned: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"warmed up {len(self.layers)} kinds of MoE layer in {self.seconds:.1f} s"]
        lines += [f"  layer {name}" for name in self.layers]
        return "\n".join([*lines, *(f"  tuned {line}" for line in self.tuned)])


def warmup(
    model: nn.Module,
    shapes: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype | None = None,
    backward: bool = True,
    losses: Callable[[RoutingPlan], Tensor] = load_balance_loss,
    tune: bool = False,
) -> WarmupReport:
    """Run every kind of ``MoE`` layer of a model once on random tokens, so that its kernels exist.

    Kernels are compiled for widths, dtypes and options, never for a number of tokens: one shape
    for each size of batch that is used (training, sampling) is enough. Parameters, gradients,
    random state and mode of the model stay as they are.

    Args:
        model: an ``MoE`` layer, or any module that holds some.
        shapes: (batch_size, seq_len) of the tokens that the layers will see.
        dtype: compute dtype, by autocast where the parameters have another; by default theirs.
        backward: also compile the backward.
        losses: what the training step adds to its loss for each layer's plan; the backward is
            compiled with it and without.
        tune: also measure tile sizes of the Triton kernels on this GPU (minutes), and keep the
            fastest in the cache folder for all later processes; needs ``backward``. Let one
            process of a job do it.
            ``MOE_KERNELS_TUNE=off`` makes this a plain warm-up.

    Returns:
        A ``WarmupReport``; print it.

    Raises:
        ValueError: when the model has no ``MoE`` layer, a shape is not two positive numbers, or
            ``tune`` comes without ``backward``.
    """
    layers = dict(_kinds_of_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no moe_kernels.MoE layer to warm up.")
    for shape in shapes:
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"shapes holds {shape!r}; expected (batch_size, seq_len), positive.")
    if tune and not backward:
        raise ValueError("tune=True with backward=False; tile sizes are measured in both.")
    report, start = WarmupReport(list(layers)), time.perf_counter()
    for layer in layers.values():
        for shape in shapes:
            step = _make_step(layer, shape, dtype, backward, losses)
            step()
            if tune:
                report.tuned += _tune(step, layer.router.weight.device)
    report.seconds = time.perf_counter() - start
    return report


def _kinds_of_layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    """The first layer of each kind, by name: equal kernels need not be compiled twice."""
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            parameters = [(p.dtype, p.device, p.requires_grad) for p in module.parameters()]
            buffers = [name for name, _ in module.named_buffers()]
            kind = (repr(module), str(module.router.routing), str(parameters), str(buffers))
            if kind not in seen:
                seen.add(kind)
                yield name or type(module).__name__, module


def _make_step(
    layer: MoE,
    shape: tuple[int, int],
    dtype: torch.dtype | None,
    backward: bool,
    losses: Callable[[RoutingPlan], Tensor],
) -> Callable[[], Any]:
    weight = layer.experts.down_proj
    device, hidden_size = weight.device, layer.router.hidden_size
    generator = torch.Generator(device).manual_seed(0)  # the caller's random state stays
    x = torch.randn(*shape, hidden_size, generator=generator, device=device).to(weight.dtype)
    leaves: list[Tensor] = [x.requires_grad_(backward)]
    leaves += [parameter for parameter in layer.parameters() if parameter.requires_grad]
    autocast = torch.autocast(device.type, dtype, enabled=dtype not in (None, weight.dtype))

    def step() -> Any:
        with torch.set_grad_enabled(backward), autocast:
            out, plan = layer(x)
        if not backward:
            return out
        loss = losses(plan)
        # Not into .grad: that is the optimiser's.
        upstream = torch.ones_like(out)
        torch.autograd.grad(out, leaves, upstream, allow_unused=True, retain_graph=True)
        if loss.requires_grad:
            torch.autograd.grad([out, loss], leaves, [upstream, None], allow_unused=True)
        return out

    return step


def _tune(step: Callable[[], Any], device: torch.device) -> list[str]:
    """Tune the Triton kernels, where they serve the device."""
    if serving("expert_mlp", device) != "triton":
        return []
    from moe_kernels.backends.triton import tuning

    return tuning.describe(tuning.tune(step, device))
