"""Checkpoints: a directory a step, written whole or not at all, refused when damaged.

This module writes those of one process. Those of several are written by
``dit_models.parallel.sharded_checkpoints`` under the same names and with the same manifest.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_models.atomic import fsync_path, sha256_of
from dit_models.extras import require

FORMAT_VERSION = 1
SHARDED_VERSION = 2
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.json"
PLAIN_NAME = "plain.json"
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
    hashes = {name: sha256_of(folder / name) for name in _FILES}
    write_manifest(folder, FORMAT_VERSION, step, hashes)
    for path in folder.iterdir():
        fsync_path(path)
    fsync_path(folder)


def write_manifest(folder: Path, version: int, step: int, hashes: dict[str, str]) -> None:
    """Write what ``read_manifest`` reads; the caller flushes it."""
    manifest = {"format_version": version, "step": step, "sha256": hashes}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2))


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
    step, hashes = read_manifest(checkpoint)
    verify_files(checkpoint, hashes, hashes)
    return step


def read_manifest(checkpoint: Path) -> tuple[int, dict[str, str]]:
    """The step of a checkpoint, and the SHA-256 that each of its files must have.

    Raises:
        CheckpointError: the manifest is missing, damaged or of a newer program.
    """
    advice = _advice(checkpoint)
    try:
        manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
        version, step, hashes = (manifest[key] for key in ("format_version", "step", "sha256"))
        known = version in (FORMAT_VERSION, SHARDED_VERSION)
        hashes = {str(name): str(value) for name, value in hashes.items()}
        step = int(step)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint}: manifest.json is missing or damaged ({error}). {advice}"
        ) from error
    if not known:
        raise CheckpointError(
            f"{checkpoint}: format version {version}; this program reads {FORMAT_VERSION} and "
            f"{SHARDED_VERSION}."
        )
    needed = _FILES if version == FORMAT_VERSION else (INDEX_NAME, PLAIN_NAME)
    wrong = [name for name in hashes if Path(name).name != name]
    if wrong or not hashes.keys() >= set(needed) or checkpoint.name != _name_of(step):
        raise CheckpointError(
            f"{checkpoint}: manifest.json is damaged (step {step}, files {sorted(hashes)}). "
            f"{advice}"
        )
    return step, hashes


def _name_of(step: int) -> str:
    return f"step_{step:08d}"


def verify_files(checkpoint: Path, names: Iterable[str], hashes: dict[str, str]) -> None:
    """Check some files of a checkpoint against the hashes of its manifest.

    Raises:
        CheckpointError: names what is missing or damaged.
    """
    for name in names:
        path = checkpoint / name
        try:
            found = sha256_of(path)
        except OSError as error:
            problem = f"is missing or cannot be read ({error.strerror})"
            raise CheckpointError(f"{path} {problem}. {_advice(checkpoint)}") from error
        if found != hashes[name]:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is not the one in manifest.json. "
                f"{_advice(checkpoint)}"
            )


def _advice(checkpoint: Path) -> str:
    return (
        "Nothing was changed. Restore that file, or continue from an older checkpoint by moving "
        f"{checkpoint} away."
    )


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
