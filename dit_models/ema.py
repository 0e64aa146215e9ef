"""Exponential moving average of the weights; sampling uses it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

ModelT = TypeVar("ModelT", bound=nn.Module)


def decay_at(decay: float, step: int) -> float:
    """d after optimizer step ``step``."""
    return min(decay, (1 + step) / (10 + step))


class EMA(Generic[ModelT]):
    """Averaged copy of a model: ``average = d · average + (1 - d) · weights`` after each step.

    ``d = min(decay, (1 + step) / (10 + step))``, so that the first steps are soon forgotten.

    Attributes:
        model: the averaged model, in eval mode, without gradients.
    """

    def __init__(self, model: ModelT, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: ModelT, step: int) -> None:
        """Average in the weights after optimizer step ``step`` (the first is 1)."""
        decay = decay_at(self.decay, step)
        averages: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = [parameter.detach() for parameter in model.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)

    @contextmanager
    def drawing_model(self) -> Iterator[ModelT]:
        """The averaged model; ``ShardedEMA`` has to put it in the place of the trained one."""
        yield self.model
