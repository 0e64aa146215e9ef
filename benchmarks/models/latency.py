"""Latency of a sparse model over its dense twin with the same activated multiply-accumulates.

With f_c = 1 the experts of a layer take S tokens together, as many as the dense FFN, and an expert
has the dense FFN's shape: what expert choice adds is the router, S D E a layer. The table shows the
ratio of all multiply-accumulates of both models (``dit_models.count``, attention included).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from benchmarks.models.weights import random_model
from benchmarks.ratios import ratios, summarize
from benchmarks.timing import Sampler, measure
from dit_models.count import count_macs
from dit_models.model_config import ModelConfig
from dit_models.presets import PRESETS


@dataclass(frozen=True)
class Twins:
    """A sparse model and the dense one of the same width, depth and activated compute."""

    name: str
    sparse: ModelConfig
    dense: ModelConfig

    @property
    def macs_ratio(self) -> float:
        """Multiply-accumulates of one image, sparse over dense, attention products included."""
        sparse, dense = (
            count_macs(config, config.image_size, config.image_size, attention=True)
            for config in (self.sparse, self.dense)
        )
        return sparse / dense


def twins(quick: bool = False) -> list[Twins]:
    """The pairs that are measured; ``quick`` cuts their depth to 2."""
    pairs = [
        Twins(f"EC-DiT-{size}/2-8E", PRESETS[f"EC-DiT-{size}/2-8E"], PRESETS[f"DiT-{size}/2"])
        for size in ("S", "B")
    ]
    tiny = replace(PRESETS["EC-DiT-tiny"], capacity_factor=1.0)
    pairs.append(Twins("EC-DiT-tiny, f_c 1", tiny, PRESETS["DiT-tiny"]))
    if quick:
        pairs = [
            Twins(pair.name, replace(pair.sparse, depth=2), replace(pair.dense, depth=2))
            for pair in pairs
        ]
    return pairs


def latency(
    pair: Twins,
    batch_sizes: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    seconds: float,
    repeats: int,
) -> list[dict[str, Any]]:
    """Seconds of one forward of both, in turns, without guidance: a dictionary a batch size.

    ``ratio`` is the median of sparse over dense inside the rounds, with quartiles.
    """
    configs = {"sparse": pair.sparse, "dense": pair.dense}
    models = {name: random_model(config).to(dtype) for name, config in configs.items()}
    found = []
    for batch_size in batch_sizes:
        inputs = _inputs(pair.dense, batch_size)
        samplers = {name: _sampler(model, inputs) for name, model in models.items()}
        samples = measure(samplers, repeats=repeats, seconds=seconds)
        ratio = ratios(samples, ours="dense")["sparse"]
        found.append(
            {
                "batch_size": batch_size,
                "seconds": {name: summarize(values).median for name, values in samples.items()},
                "ratio": ratio.median,
                "quartiles": [ratio.low, ratio.high],
                "rounds": len(samples["dense"]),
            }
        )
    return found


def _inputs(config: ModelConfig, batch_size: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch_size, config.in_channels, config.image_size, config.image_size)
    labels = torch.randint(config.num_classes, (batch_size,), generator=generator)
    timesteps = torch.rand(batch_size, generator=generator)
    return torch.randn(shape, generator=generator), timesteps, labels


def _sampler(model: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> Sampler:
    def sample(inner: int) -> float:
        with torch.inference_mode():
            start = perf_counter()
            for _ in range(inner):
                model(*inputs)
            return perf_counter() - start

    return sample
