"""The time that a run spends on training."""

import time

import torch

from dit_models.trainer import Trainer


class Stopwatch:
    """Adds the time of training steps, and of nothing else, to ``trainer.train_seconds``.

    A GPU works on after a step returns, so each reading waits for it first.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._since = time.perf_counter()

    def lap(self) -> None:
        """Count the time since the last ``lap`` or ``skip`` as training."""
        if self._trainer.device.type == "cuda":
            torch.cuda.synchronize(self._trainer.device)
        self._trainer.train_seconds += time.perf_counter() - self._since
        self._since = time.perf_counter()

    def skip(self) -> None:
        """Leave out the time since the last ``lap``: it was spent on something else."""
        self._since = time.perf_counter()
