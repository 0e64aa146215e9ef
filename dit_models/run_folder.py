"""The folder of a run: where things are, and how to load its averaged model."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from dit_models.assemble import (
    autocast_for,
    build_conditioned_model,
    build_objective,
    pick_device,
    with_defaults,
)
from dit_models.atomic import write_text
from dit_models.checkpoint_weights import load_stored_weights
from dit_models.checkpoints import CheckpointError, list_checkpoints, verify_checkpoint
from dit_models.config import TrainConfig
from dit_models.config_io import load_config
from dit_models.data import DatasetInfo
from dit_models.drawing import Artist
from dit_models.metrics import METRICS_NAME
from dit_models.pretrained import is_pretrained, load_pretrained, read_pretrained
from dit_models.vae import decoder_of

try:
    import fcntl
except ImportError:  # not on Windows, where two processes in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

CONFIG_NAME = "config.yaml"
INFO_NAME = "data.json"
SUMMARY_NAME = "summary.json"
_LOCK_NAME = ".lock"
NEEDS_VAE = (
    "this model draws latents of {channels} channels, and its folder names no VAE: sample with "
    "--vae FOLDER, or convert the weights with --vae FOLDER."
)


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


def holds_other_files(run_dir: Path) -> bool:
    """Whether a folder has files but no run, so that training into it could overwrite them."""
    # Hidden are the lock, the heartbeats, and what a process left that was killed at the start.
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith(".")}
    return bool(names) and METRICS_NAME not in names


_locks: set[TextIO] = set()


def _leave_locks_to_the_parent() -> None:
    """In a forked process, which may outlive the one that trains."""
    for stream in _locks:
        stream.close()


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold a run's folder for this process; the lock ends with the process, however it ends.

    Raises:
        CheckpointError: when another process holds it.
    """
    with open(run_dir / _LOCK_NAME, "w") as stream:
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(
                    f"another process is training in {run_dir}; choose another name or wait."
                ) from error
        _locks.add(stream)
        try:
            yield
        finally:
            _locks.discard(stream)


@dataclass(frozen=True)
class LoadedRun:
    """A trained run, ready to draw from."""

    artist: Artist
    config: TrainConfig
    info: DatasetInfo
    step: int


def save_info(run_dir: Path, info: DatasetInfo) -> None:
    """Keep what a model needs to know of its data, so that sampling needs no images."""
    write_text(run_dir / INFO_NAME, json.dumps(asdict(info), indent=2) + "\n")


def load_info(run_dir: Path) -> DatasetInfo:
    """Read what ``save_info`` wrote.

    Raises:
        ValueError: when the file is missing or damaged.
    """
    path = run_dir / INFO_NAME
    try:
        return DatasetInfo(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error


def verified_checkpoint(run_dir: Path) -> tuple[Path, int]:
    """The newest checkpoint of a run and its step, every file checked.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    checkpoints = list_checkpoints(checkpoint_folder(run_dir))
    if not checkpoints:
        raise CheckpointError(f"{run_dir} has no checkpoint yet; train it first.")
    return checkpoints[-1], verify_checkpoint(checkpoints[-1])


def load_run(run_dir: Path, device: str = "auto") -> LoadedRun:
    """Load the averaged weights of a run's newest checkpoint, or an exported or converted model.

    Raises:
        ValueError: when the folder is not that of a run or model.
        CheckpointError: without a checkpoint, or when it is damaged.
    """
    if is_pretrained(run_dir):
        return _load_model_folder(run_dir, device)
    config = with_defaults(load_config(run_dir / CONFIG_NAME))
    checkpoint, step = verified_checkpoint(run_dir)
    target = pick_device(device)
    info = load_info(run_dir)
    model = build_conditioned_model(config, info, target)
    load_stored_weights(checkpoint, "ema", model)
    artist = Artist(
        model.eval().requires_grad_(False),
        build_objective(config.objective),
        config.sampling,
        (info.channels, info.image_size, info.image_size),
        target,
        partial(autocast_for, config.precision, target),
        decoder_of(info.vae, config.data.vae, target),
    )
    return LoadedRun(artist, config, info, step)


def _load_model_folder(folder: Path, device: str) -> LoadedRun:
    described = read_pretrained(folder)
    config, info = with_defaults(described.train), described.info
    target = pick_device(device)
    # Processors compute in fp16 slowly, and some not at all.
    dtype = torch.float32 if target.type == "cpu" else None
    artist = Artist(
        load_pretrained(folder, target, dtype),
        build_objective(config.objective),
        config.sampling,
        (info.channels, info.image_size, info.image_size),
        target,
        partial(autocast_for, config.precision, target),
        decoder_of(info.vae, config.data.vae, target) or _refusal_of_latents(info.channels),
    )
    return LoadedRun(artist, config, info, described.step)


def _refusal_of_latents(channels: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What stands in for the VAE of converted weights, whose VAE nobody named."""
    if channels in (1, 3):
        return None

    def decode(latents: torch.Tensor) -> torch.Tensor:
        raise ValueError(NEEDS_VAE.format(channels=latents.shape[1]))

    return decode
