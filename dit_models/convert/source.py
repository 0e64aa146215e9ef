"""Open what others wrote: where each tensor lies, without reading any."""

import argparse
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_models.atomic import sha256_of
from dit_models.tensor_files import StoredTensor, read_header, read_sharded

# Where containers keep their weights, the preferred first: averaged weights are what is sampled.
CONTAINER_KEYS = ("ema", "model", "module")
DIFFUSERS_STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Source:
    """A checkpoint of somebody else's format.

    Attributes:
        path: the file or folder.
        tensors: where each tensor lies, by its name in the checkpoint.
        container: the key under which a ``.pt`` file holds them; ``None`` for a bare state dict.
        left_out: entries beside the weights, which are not converted.
        config: ``config.json`` of a diffusers folder.
        files: the files that hold tensors.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    container: str | None = None
    left_out: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def sha256(self) -> dict[str, str]:
        """Digest of each file."""
        return {path.name: sha256_of(path) for path in self.files}


def open_source(path: Path, weights: str | None = None) -> Source:
    """Find the tensors of a ``.pt`` file, a safetensors file or a diffusers folder.

    Args:
        path: the file or folder.
        weights: entry of a ``.pt`` container to take, instead of the first of
            ``CONTAINER_KEYS`` that is there.

    Raises:
        ValueError: nothing is there, or it is not readable without running code from it.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    if path.is_dir() or path.suffix == ".safetensors":
        if weights is not None:
            raise ValueError(f"--weights {weights}: {path} is no .pt container; leave it out.")
        return _open_folder(path) if path.is_dir() else _open_safetensors(path)
    return _open_torch(path, weights)


def _open_safetensors(path: Path) -> Source:
    return Source(path, read_header(path), files=(path,))


def _open_folder(folder: Path) -> Source:
    config_path = folder / "config.json"
    if not config_path.is_file() and (folder / "transformer" / "config.json").is_file():
        return _open_folder(folder / "transformer")  # a whole diffusers pipeline
    try:
        config = json.loads(config_path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is no folder of diffusers weights: config.json cannot be read ({error})."
        ) from error
    tensors = read_sharded(folder, DIFFUSERS_STEM)
    files = tuple(sorted({tensor.path for tensor in tensors.values()}))
    return Source(folder, tensors, config=config, files=files)


def _open_torch(path: Path, weights: str | None) -> Source:
    content = _load_places(path)
    container = _container_key(path, content, weights)
    entries = content if container is None else content[container]
    others = () if container is None else tuple(str(key) for key in content if key != container)
    tensors = {name: _place(path, name, value) for name, value in entries.items()}
    return Source(path, tensors, container, others, files=(path,))


def _load_places(path: Path) -> Mapping[str, Any]:
    """The content of a ``.pt`` file with placeholders, which know their place, for the tensors."""
    try:
        # Training scripts keep their options as a Namespace, which is a plain record.
        with FakeTensorMode(), torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Before it stands torch's advice to load the file all the same.
        text = str(error).split("trusted source.")[-1].split("WeightsUnpickler error:")[-1]
        reason = " ".join(text.split())[:300]
        raise ValueError(
            f"{path} holds more than tensors and plain values, and loading that could run code: "
            f"{reason} Nothing was loaded. If you trust the file, open it yourself with "
            "torch.load(..., weights_only=False) and save its weights alone: "
            'torch.save({"ema": content["ema"]}, "weights.pt").'
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is no checkpoint of torch.save, or is damaged: {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict of tensors.")
    return content


def _container_key(path: Path, content: Mapping[str, Any], weights: str | None) -> str | None:
    if weights is not None:
        if not isinstance(content.get(weights), Mapping):
            held = [str(key) for key, value in content.items() if isinstance(value, Mapping)]
            raise ValueError(
                f"--weights {weights}: {path} has no such entry; expected one of "
                f"{', '.join(held) or 'none: it is a bare state dict'}."
            )
        return weights
    for key in CONTAINER_KEYS:
        if isinstance(content.get(key), Mapping):
            return key
    return None


def _place(path: Path, name: str, value: Any) -> StoredTensor:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor; expected a state "
            f"dict, bare or under one of {', '.join(CONTAINER_KEYS)}."
        )
    if not value.is_contiguous():
        raise ValueError(f"{path}: tensor {name} is not contiguous; save it after .contiguous().")
    offset = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise ValueError(
            f"{path} is in the format before torch 1.6, which cannot be read in parts; load it and "
            "save it again with torch.save."
        )
    start = int(offset) + int(value.storage_offset()) * value.element_size()
    return StoredTensor(path, start, value.dtype, tuple(value.shape))
