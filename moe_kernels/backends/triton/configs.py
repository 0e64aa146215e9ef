"""Which tile sizes a product gets: from the tuning cache, else from the shipped table.

The key is (architecture, product, dtype, widths, bucket of rows an expert): never the number of
tokens itself, so that no batch size compiles or tunes anything of its own.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.backends.triton import tuning_cache
from moe_kernels.backends.triton.config_table import BUCKETS, FAMILIES, FP32, SIXTEEN_BIT, Config
from moe_kernels.backends.triton.launch import Target, block_size


class Key(NamedTuple):
    """What a config is chosen by."""

    product: str
    arch: str
    dtype: torch.dtype
    in_features: int
    out_features: int
    bucket: str


@dataclass
class Trial:
    """Configs to use instead of the chosen ones, and the keys that were asked for meanwhile."""

    configs: dict[Key, Config] = field(default_factory=dict)
    seen: dict[Key, Config] = field(default_factory=dict)


_forced: Config | None = None
_trial: Trial | None = None


def bucket_of(rows_per_expert: int) -> str:
    """Name of the bucket of a mean number of rows an expert."""
    for name, end in BUCKETS.items():
        if end is None or rows_per_expert <= end:
            return name
    raise AssertionError("the last bucket has no end")


def shipped(arch: str, dtype: torch.dtype) -> dict[str, dict[str, Config]]:
    """The shipped configs of an architecture: product -> bucket -> config.

    An architecture without a table of its own gets that of compute capability 8.0, which asks for
    the least; for AMD that of gfx942.
    """
    family = FAMILIES.get(arch, "gfx942" if arch.startswith("gfx") else "sm_80")
    return (FP32 if dtype == torch.float32 else SIXTEEN_BIT)[family]


def choose(
    product: str,
    target: Target,
    dtype: torch.dtype,
    in_features: int,
    out_features: int,
    rows_per_expert: int,
    aligned: bool = True,
) -> Config:
    """The config of one product.

    Args:
        product: one of ``config_table.PRODUCTS``.
        target: the device.
        dtype: of the operands.
        in_features, out_features: of the product; for ``weight_bwd`` the matrix's two sides.
        rows_per_expert: mean over the experts.
        aligned: whether rows of the operands start at multiples of 16 bytes.
    """
    if _forced is not None:
        return _forced
    bucket = bucket_of(rows_per_expert)
    key = Key(product, target.arch, dtype, in_features, out_features, bucket)
    if not aligned:
        return unaligned(_choose(key))
    if _trial is None:
        return _choose(key)
    config = _trial.configs.get(key) or _choose(key)
    _trial.seen[key] = config
    return config


@lru_cache(maxsize=4096)
def _choose(key: Key) -> Config:
    return tuning_cache.find(*key) or fit(
        shipped(key.arch, key.dtype)[key.product][key.bucket], key
    )


def fit(config: Config, key: Key) -> Config:
    """The config with no tile wider than a narrow layer's matrix."""
    if key.product == "weight_bwd":
        return replace(
            config,
            block_m=block_size(key.in_features, largest=config.block_m),
            block_n=block_size(key.out_features, largest=config.block_n),
        )
    return replace(
        config,
        block_n=block_size(key.out_features, largest=config.block_n),
        block_k=block_size(key.in_features, largest=config.block_k),
    )


def unaligned(config: Config) -> Config:
    """A small tile for operands that are loaded number by number: addresses fill the registers."""
    return replace(
        config,
        block_m=min(config.block_m, 32),
        block_n=min(config.block_n, 32),
        block_k=min(config.block_k, 32),
        num_warps=4,
        num_stages=min(config.num_stages, 2),
        persistent=False,
        blocks=1,
    )


def forget() -> None:
    """Read the tuning cache again."""
    tuning_cache.load.cache_clear()
    _choose.cache_clear()


@contextlib.contextmanager
def forced(config: Config) -> Iterator[None]:
    """Use one config for every product, in tuning and in compile checks."""
    global _forced
    previous, _forced = _forced, config
    try:
        yield
    finally:
        _forced = previous


@contextlib.contextmanager
def tried(configs: dict[Key, Config]) -> Iterator[Trial]:
    """Use these configs for their keys; collects every key that is asked for."""
    global _trial
    previous, _trial = _trial, Trial(dict(configs))
    try:
        yield _trial
    finally:
        _trial = previous


def precision(operand: Tensor, arch: str) -> str:
    """``input_precision`` of ``tl.dot``: TF32 for fp32 operands if PyTorch allows it."""
    if operand.dtype != torch.float32 or arch.startswith("gfx") or arch == "interpreter":
        return "ieee"
    return "tf32" if _tf32_allowed() else "ieee"


def _tf32_allowed() -> bool:
    # The newer attribute speaks for both; asking the older one after it was set raises.
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if newer is not None:
        return newer == "tf32"
    return torch.backends.cuda.matmul.allow_tf32
