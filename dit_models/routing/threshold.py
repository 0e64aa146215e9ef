"""A threshold that is learnt as a running mean, and the checks of the options around it."""

from typing import Any, get_args

import torch
from torch import Tensor, nn

from dit_models.routing.base import fail_option, is_number


def check_inference(inference: object, modes: Any) -> None:
    """Raise ``ValueError`` unless ``inference`` is one of the modes (a ``Literal``)."""
    if inference not in get_args(modes):
        fail_option("inference", inference, f"expected one of {', '.join(get_args(modes))}")


def check_decay(decay: float) -> None:
    """Raise ``ValueError`` unless ``threshold_decay`` is a number from 0 to below 1."""
    if not is_number(decay) or not 0 <= decay < 1:
        fail_option("threshold_decay", decay, "expected a number from 0 to below 1")


class RunningThreshold(nn.Module):
    """``value = d · value + (1 - d) · observed`` with d = min(decay, n / (n + 1)) at update n.

    So the first updates are their plain mean, and no start value is left in it. Both buffers are
    saved with the weights. Before the first update the value is 0.

    Args:
        shape: of the threshold.
        decay: d after the first updates.
    """

    value: Tensor
    updates: Tensor

    def __init__(self, shape: tuple[int, ...], decay: float, device: Any = None) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("value", torch.zeros(shape, device=device, dtype=torch.float32))
        self.register_buffer("updates", torch.zeros((), device=device, dtype=torch.int64))

    @torch.no_grad()
    def update(self, observed: Tensor) -> None:
        """Take in the threshold of one step; nothing is asked of the device."""
        decay = (self.updates / (self.updates + 1)).clamp(max=self.decay)
        self.value.lerp_(observed.to(self.value.dtype), (1 - decay).to(self.value.dtype))
        self.updates.add_(1)

    def reset(self) -> None:
        """As before the first update."""
        self.value.zero_()
        self.updates.zero_()
