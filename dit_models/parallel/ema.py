"""Averaged weights of a divided model: each process averages what it holds."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dit_models.conditioned import ConditionedModel
from dit_models.ema import decay_at
from dit_models.parallel.gradients import local
from dit_models.parallel.shard import free_gathered_weights


class ShardedEMA:
    """As ``EMA``, without a second model: a tensor for each of the model's, on its mesh.

    Attributes:
        tensors: the averages by name, as in the model's state dict.
    """

    def __init__(self, model: ConditionedModel, decay: float) -> None:
        self.decay = decay
        self._model = model
        self.tensors = {name: value.detach().clone() for name, value in _state(model).items()}

    @torch.no_grad()
    def update(self, model: ConditionedModel, step: int) -> None:
        """Average in the weights after optimizer step ``step`` (the first is 1)."""
        averages, weights = [], []
        for name, value in _state(model).items():
            if isinstance(value, torch.nn.Parameter):
                averages.append(local(self.tensors[name]))
                weights.append(local(value.detach()))
            else:
                self.tensors[name].copy_(value)
        torch._foreach_lerp_(averages, weights, 1 - decay_at(self.decay, step))

    @contextmanager
    def drawing_model(self) -> Iterator[ConditionedModel]:
        """The model with the averages in the place of its weights, in eval mode."""
        was_training = self._model.training
        self._exchange()
        try:
            yield self._model.eval()
        finally:
            self._exchange()
            self._model.train(was_training)

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, value in _state(self._model).items():
            mine, average = local(value.detach()), local(self.tensors[name])
            before = mine.clone()
            mine.copy_(average)
            average.copy_(before)
        free_gathered_weights(self._model)


def _state(model: ConditionedModel) -> dict[str, Tensor]:
    return model.state_dict(keep_vars=True)
