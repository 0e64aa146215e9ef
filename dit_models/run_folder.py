"""The folder of a run: where things are, and how to load its averaged model."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dit_models.assemble import (
    autocast_for,
    build_conditioned_model,
    build_objective,
    pick_device,
    with_defaults,
)
from dit_models.checkpoints import (
    CheckpointError,
    list_checkpoints,
    load_weights,
    verify_checkpoint,
)
from dit_models.config import TrainConfig
from dit_models.config_io import load_config
from dit_models.data import DatasetInfo, ImageDataset, build_dataset
from dit_models.drawing import Artist

CONFIG_NAME = "config.yaml"
SUMMARY_NAME = "summary.json"


def run_dir_of(config: TrainConfig) -> Path:
    """``run_dir`` where it is set, else ``runs/NAME``.

    Raises:
        ValueError: when the name would leave the folder ``runs``.
    """
    if config.run_dir:
        return Path(config.run_dir)
    if not config.name or Path(config.name).name != config.name or config.name in (".", ".."):
        raise ValueError(f"name={config.name!r}; expected a plain folder name such as my-run.")
    return Path("runs") / config.name


def checkpoint_folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


@dataclass(frozen=True)
class LoadedRun:
    """A trained run, ready to draw from."""

    artist: Artist
    config: TrainConfig
    info: DatasetInfo
    dataset: ImageDataset
    step: int


def load_run(run_dir: Path, device: str = "auto") -> LoadedRun:
    """Load the averaged weights of a run's newest checkpoint.

    Raises:
        ValueError: when the folder is not that of a run.
        CheckpointError: without a checkpoint, or when it is damaged.
    """
    config = with_defaults(load_config(run_dir / CONFIG_NAME))
    checkpoints = list_checkpoints(checkpoint_folder(run_dir))
    if not checkpoints:
        raise CheckpointError(f"{run_dir} has no checkpoint yet; train it first.")
    step = verify_checkpoint(checkpoints[-1])
    target = pick_device(device)
    dataset = build_dataset(
        config.data.name,
        split=config.data.split,
        image_size=config.data.image_size,
        flip=config.data.flip,
    )
    info = dataset.info
    model = build_conditioned_model(config, info, target)
    load_weights(checkpoints[-1], "ema", model)
    artist = Artist(
        model.eval().requires_grad_(False),
        build_objective(config.objective),
        config.sampling,
        (info.channels, info.image_size, info.image_size),
        target,
        partial(autocast_for, config.precision, target),
    )
    return LoadedRun(artist, config, info, dataset, step)
