"""Text features on disk, a file for each prompt, found by its hash."""

import hashlib
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from dit_models.atomic import write_bytes
from dit_models.extras import require
from dit_models.text.spec import EncoderSpec


class EmbeddingCache:
    """A folder of safetensors files, each named by the SHA-256 of the prompt and the encoder.

    The hash is over the encoder's identity, max_length, layer, dtype, and the prompt.

    One file a prompt, so that several processes fill one folder without a lock or an index: each
    file appears whole, and two that write the same prompt write the same thing. Padding is not
    kept. Each file carries the SHA-256 of its features; one that does not match is made again.

    Args:
        folder: made when the first file is.

    Attributes:
        hits, misses: prompts found and not found so far.
        damaged: files that did not hold what they should; these are counted as misses too.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.hits = 0
        self.misses = 0
        self.damaged = 0

    def path_of(self, spec: EncoderSpec, prompt: str) -> Path:
        """The file of a prompt."""
        key = _key(spec, prompt)
        return self.folder / key[:2] / f"{key}.safetensors"

    def load(self, spec: EncoderSpec, prompt: str) -> Tensor | None:
        """The features (n, dim) of a prompt on the CPU; ``None`` when they have to be computed."""
        path = self.path_of(spec, prompt)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            self.misses += 1
            return None
        safetensors = require("safetensors.torch", extra="train")
        try:
            tensors = safetensors.load(data)
            features = tensors["features"]
            intact = bytes(tensors["sha256"].tolist()) == _digest(path.stem, features)
        except Exception:  # the library's errors for a broken file share no class
            intact = False
        if not intact:
            warnings.warn(f"{path} is damaged; its prompt is encoded again.", stacklevel=2)
            self.damaged += 1
            self.misses += 1
            return None
        self.hits += 1
        return features

    def save(self, spec: EncoderSpec, prompt: str, features: Tensor) -> None:
        """Keep the features (n, dim) of a prompt."""
        safetensors = require("safetensors.torch", extra="train")
        features = features.detach().cpu().contiguous()
        path = self.path_of(spec, prompt)
        digest = torch.tensor(list(_digest(path.stem, features)), dtype=torch.uint8)
        write_bytes(path, safetensors.save({"features": features, "sha256": digest}))


def _key(spec: EncoderSpec, prompt: str) -> str:
    return hashlib.sha256(json.dumps([spec.features_key, prompt]).encode()).hexdigest()


def _digest(key: str, features: Tensor) -> bytes:
    """Over the key too, so that a file under another prompt's name is found out."""
    shape = f"{key}:{features.dtype}:{tuple(features.shape)}:"
    data = features.view(torch.uint8).numpy().tobytes() if features.numel() else b""
    return hashlib.sha256(shape.encode() + data).digest()
