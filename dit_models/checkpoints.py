"""Checkpoints: a directory a step, written whole or not at all, refused when damaged."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_models.atomic import fsync_path, sha256_of
from dit_models.extras import require

FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d{8})")
_FILES = ("model.safetensors", "ema.safetensors", "training_state.pt")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run."""


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    ema: nn.Module,
    training_state: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``folder/step_XXXXXXXX`` and then remove all but the newest ``keep``.

    Everything is written and flushed under a temporary name and renamed at the end, so a
    checkpoint that exists is complete. An existing checkpoint of this step is left as it is.

    Args:
        folder: the run's checkpoint folder.
        step: optimizer steps done.
        model, ema: saved as safetensors.
        training_state: tensors and plain values (optimizer, random states, position, ...).
        keep: newest checkpoints to keep.

    Returns:
        The checkpoint's directory.
    """
    target = folder / f"step_{step:08d}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".writing-{target.name}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            _write_files(temporary, step, model, ema, training_state)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_path(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def _write_files(
    folder: Path, step: int, model: nn.Module, ema: nn.Module, training_state: dict[str, Any]
) -> None:
    safetensors = require("safetensors.torch", extra="train")
    for name, module in (("model", model), ("ema", ema)):
        tensors = {key: value.detach().contiguous() for key, value in module.state_dict().items()}
        safetensors.save_file(tensors, folder / f"{name}.safetensors")
    torch.save(training_state, folder / "training_state.pt")
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "sha256": {name: sha256_of(folder / name) for name in _FILES},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for path in folder.iterdir():
        fsync_path(path)
    fsync_path(folder)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest step first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def verify_checkpoint(checkpoint: Path) -> int:
    """Check every file of a checkpoint against its manifest and return its step.

    Raises:
        CheckpointError: names what is missing or damaged.
    """
    advice = (
        "Nothing was changed. Restore that file, or continue from an older checkpoint by moving "
        f"{checkpoint} away."
    )
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        version, step, hashes = (manifest[key] for key in ("format_version", "step", "sha256"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint}: manifest.json is missing or damaged ({error}). {advice}"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint}: format version {version}; this program reads {FORMAT_VERSION}."
        )
    for name in _FILES:
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing. {advice}")
        if sha256_of(path) != hashes.get(name):
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is not the one in manifest.json. {advice}"
            )
    return int(step)


def load_weights(checkpoint: Path, name: str, module: nn.Module) -> None:
    """Load ``model`` or ``ema`` weights of a verified checkpoint into a module.

    Raises:
        CheckpointError: when the weights do not fit the module, with the differing keys.
    """
    safetensors = require("safetensors.torch", extra="train")
    tensors = safetensors.load_file(checkpoint / f"{name}.safetensors")
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint}/{name}.safetensors does not fit the model: {error}"
        ) from error


def load_training_state(checkpoint: Path) -> dict[str, Any]:
    """Everything but the weights; reads tensors and plain values only, never pickled code."""
    return torch.load(checkpoint / "training_state.pt", map_location="cpu", weights_only=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left under temporary names."""
    if folder.is_dir():
        for path in folder.glob(".writing-*"):
            shutil.rmtree(path)
