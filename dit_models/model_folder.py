"""A model somebody else made: its folder from a path or a name, and what identifies its content."""

import fnmatch
import hashlib
import json
from functools import lru_cache
from pathlib import Path

from dit_models.atomic import sha256_of
from dit_models.extras import require

WEIGHT_PATTERNS = ("*.safetensors", "*pytorch_model*.bin")
_SETTING_PATTERNS = ("*.json", "*.model", "*.txt")


def locate_model(path_or_name: str, revision: str = "main") -> Path:
    """The folder of a model: the path itself, or Hugging Face's snapshot of a name.

    A name is looked for in the local cache of downloads and then on the network (never with
    ``HF_HUB_OFFLINE=1``). Safetensors are preferred to ``*pytorch_model*.bin``.

    Raises:
        ValueError: neither a folder nor a name that can be had; says what to do.
    """
    path = Path(path_or_name)
    if path.is_dir():
        return path
    if path.is_absolute() or path_or_name.startswith(".") or path_or_name.count("/") != 1:
        raise ValueError(
            f"{path_or_name!r}: no such folder. Give the folder of a model (with config.json), or "
            "its name on the Hugging Face hub, such as google/t5-v1_1-base."
        )
    hub = require("huggingface_hub", extra="data")
    try:
        for weights in WEIGHT_PATTERNS:
            folder = Path(
                hub.snapshot_download(
                    path_or_name, revision=revision, allow_patterns=[*_SETTING_PATTERNS, weights]
                )
            )
            if any(folder.glob(weights)):
                break
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path_or_name!r} is neither a folder nor a model that can be downloaded here "
            f"({type(error).__name__}). Download it where there is a network "
            f"(hf download {path_or_name} --local-dir FOLDER) and give that folder."
        ) from error
    return folder


def identity_of(folder: Path, extra_folder: Path | None = None) -> str:
    """SHA-256 of the settings, tokenizer and weights in a model's folder, sub-folders left out.

    Two folders with the same files have one identity, wherever they are. Files are read once in a
    process unless they change.

    Args:
        folder: the model.
        extra_folder: a second folder that belongs to it, such as its tokenizer's.
    """
    total = hashlib.sha256()
    for place in (folder, extra_folder):
        if place is None:
            continue
        files = {path.name: _cached_sha256(*_state_of(path)) for path in _files_of(place)}
        total.update(json.dumps(files, sort_keys=True).encode())
    return total.hexdigest()


def _files_of(folder: Path) -> list[Path]:
    patterns = (*_SETTING_PATTERNS, *WEIGHT_PATTERNS)
    named = (
        path
        for path in sorted(folder.iterdir())
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
    )
    return [path for path in named if path.is_file()]


def _state_of(path: Path) -> tuple[Path, int, int]:
    status = path.stat()
    return path, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1024)
def _cached_sha256(path: Path, size: int, modified: int) -> str:
    return sha256_of(path)
