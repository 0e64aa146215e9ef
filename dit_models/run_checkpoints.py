"""Saving a run and going on with it, for one process and for several."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_models.checkpoints import (
    CheckpointError,
    list_checkpoints,
    load_training_state,
    load_weights,
    remove_unfinished,
    save_checkpoint,
    verify_checkpoint,
)
from dit_models.conditioned import ConditionedModel
from dit_models.config import TrainConfig
from dit_models.config_io import differing_fields, fields_of
from dit_models.ema import EMA
from dit_models.parallel.checkpoint_files import is_sharded
from dit_models.parallel.run_state import refresh_buffers, state_tensors
from dit_models.parallel.world import World
from dit_models.rng import get_rng_state, set_rng_state
from dit_models.run_folder import checkpoint_folder

if TYPE_CHECKING:  # they load torch.distributed, which one process does not need
    from dit_models.parallel.ema import ShardedEMA
    from dit_models.parallel.sharded_checkpoints import CheckpointWriter


class RunCheckpoints:
    """The checkpoints of a run: one process writes whole files, several write their shards.

    Either can be read by any number of processes. Several processes make this together.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        world: World,
        model: ConditionedModel,
        ema: "EMA[ConditionedModel] | ShardedEMA",
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> None:
        self.folder = checkpoint_folder(run_dir)
        self.writer = self._start_writer(config, world)
        self._config = config
        self._world = world
        self._model = model
        self._ema = ema
        self._optimizer = optimizer
        self._generator = generator

    def _start_writer(self, config: TrainConfig, world: World) -> "CheckpointWriter | None":
        if world.size == 1:
            return None
        from dit_models.parallel.sharded_checkpoints import CheckpointWriter

        return CheckpointWriter(self.folder, config.keep_checkpoints, world.host_group)

    def save(self, step: int, progress: dict[str, Any]) -> Path:
        """Write a checkpoint; with several processes in the background.

        Args:
            step: optimizer steps done.
            progress: plain values that ``load`` gives back.

        Returns:
            The checkpoint's directory, which appears when it is complete.

        Raises:
            OSError: one process only, when it could not be written.
        """
        config = {name: value for name, value, _ in fields_of(self._config)}
        if self.writer is not None:
            ema = self._averages()
            tensors = state_tensors(self._model, ema, self._optimizer, self._generator)
            plain = {"config": config, "processes": self._world.size, **progress}
            self.writer.save(step, tensors, plain)
            return self.folder / f"step_{step:08d}"
        assert isinstance(self._ema, EMA)
        state = {
            "config": config,
            "optimizer": self._optimizer.state_dict(),
            "rng": get_rng_state(self._generator),
            **progress,
        }
        keep = self._config.keep_checkpoints
        return save_checkpoint(self.folder, step, self._model, self._ema.model, state, keep)

    def failures(self) -> list[str]:
        """What went wrong with saves in the background since the last call."""
        return [] if self.writer is None else self.writer.failures()

    def wait(self) -> None:
        """Wait for the save that is under way in the background, if one is."""
        if self.writer is not None:
            self.writer.wait()

    def newest(self) -> Path | None:
        """The newest checkpoint, as the first process finds it; unfinished ones are removed."""

        def find() -> Path | None:
            remove_unfinished(self.folder)
            return next(reversed(list_checkpoints(self.folder)), None)

        return self._world.lead(find)

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Fill model, averages, optimizer and generator, and return the plain values.

        The checkpoint may come from another number of processes, or another division among them.

        Raises:
            CheckpointError: when it is damaged or was made with other settings.
        """
        if self._world.size == 1 and not is_sharded(checkpoint):
            return self._load_whole(checkpoint)
        from dit_models.parallel.restore import restore

        state = restore(
            checkpoint,
            self._model,
            self._averages(),
            self._optimizer,
            self._generator,
            partial(self._check_same_settings, checkpoint),
            self._world.host_group,
        )
        if isinstance(self._ema, EMA):
            refresh_buffers(self._ema.model)
        return state

    def _load_whole(self, checkpoint: Path) -> dict[str, Any]:
        """Fill a run in one process from a checkpoint of one process."""
        assert isinstance(self._ema, EMA)
        verify_checkpoint(checkpoint)
        state = load_training_state(checkpoint)
        self._check_same_settings(checkpoint, state)
        load_weights(checkpoint, "model", self._model)
        load_weights(checkpoint, "ema", self._ema.model)
        self._optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"], self._generator)
        return state

    def _averages(self) -> dict[str, Tensor]:
        return self._ema.model.state_dict() if isinstance(self._ema, EMA) else self._ema.tensors

    def _check_same_settings(self, checkpoint: Path, state: dict[str, Any]) -> None:
        before, now = state.get("processes", 1), self._world.size
        local = self._config.parallel.pool == "local"
        if local and before != now and self._model.backbone.config.pools_images:
            raise CheckpointError(
                f"{checkpoint} was made by {before} processes, and {now} go on: with "
                "parallel.pool=local the images of each process compete for experts, so that the "
                f"training would become another. Start {before} processes."
            )
        if different := differing_fields(state["config"], self._config):
            settings = self.folder.parent / "config.yaml"
            raise CheckpointError(
                f"{checkpoint} was made with other settings ({'; '.join(different)}). Start a new "
                f"run with name=ANOTHER, or use the settings of {settings}."
            )
