"""Measured configs on disk: one JSON file for each architecture, written by ``warmup``."""

import json
import os
import tempfile
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
import triton

from moe_kernels.backends.triton.config_table import Config
from moe_kernels.cache import cache_folder

CHOICES = ("auto", "off")


def enabled() -> bool:
    """Whether tuned configs are read and written: ``MOE_KERNELS_TUNE`` is not ``off``.

    Raises:
        ValueError: for another value than ``auto`` and ``off``.
    """
    choice = os.environ.get("MOE_KERNELS_TUNE") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"MOE_KERNELS_TUNE is {choice!r}; expected {' or '.join(CHOICES)}.")
    return choice == "auto"


def path_of(arch: str) -> Path:
    """The file of an architecture; another Triton may rank configs differently, so has its own."""
    version = ".".join(triton.__version__.split(".")[:2])
    return cache_folder() / "tuning" / f"{arch}-triton-{version}.json"


def key_of(
    product: str, dtype: torch.dtype, in_features: int, out_features: int, bucket: str
) -> str:
    """Key of an entry; never holds a number of tokens."""
    return f"{product} {str(dtype).removeprefix('torch.')} {in_features} {out_features} {bucket}"


def find(
    product: str, arch: str, dtype: torch.dtype, in_features: int, out_features: int, bucket: str
) -> Config | None:
    """The measured config of a product, if there is one and tuning is not off."""
    if arch == "interpreter" or not enabled():
        return None
    return load(arch).get(key_of(product, dtype, in_features, out_features, bucket))


@lru_cache(maxsize=16)
def load(arch: str) -> dict[str, Config]:
    """All entries of an architecture; none where the file is missing.

    Raises:
        ValueError: when the file is not one of ours; says which to remove.
    """
    try:
        path = path_of(arch)
        text = path.read_text()
    except (OSError, RuntimeError):  # no file, no home, or none that we may read
        return {}
    try:
        entries = json.loads(text)
        return {key: Config(**fields) for key, fields in entries.items()}
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a tuning cache of this version ({error}); remove it, or set "
            "MOE_KERNELS_TUNE=off."
        ) from None


def store(arch: str, measured: dict[str, Config]) -> Path:
    """Add entries to the file of an architecture; the file is replaced whole or not at all."""
    path = path_of(arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    load.cache_clear()
    entries = {**load(arch), **measured}
    text = json.dumps({key: asdict(config) for key, config in sorted(entries.items())}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text + "\n")
    try:
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise
    load.cache_clear()
    return path
