"""Images a second of a converted DiT-MoE beside the loop that it was published with.

Random weights are saved in the container of the released ones (``torch.save`` of a dict with the
entry "ema"), converted by ``dit_models.convert`` and loaded again. The published side is
``tests/models/published_dit_moe.py``, written from its description: a Python loop over the experts.
Both run the same DDPM steps with both branches of the guidance in one forward.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.ratios import ratios, summarize
from benchmarks.timing import Sampler, measure
from dit_models.backbone import DiT
from dit_models.convert import Choices, convert
from dit_models.diffusion import DDPM, generate, noise_from_seeds
from dit_models.diffusion.noise import StepNoise
from dit_models.model_config import ModelConfig
from dit_models.models import get_config
from dit_models.pretrained import load_pretrained
from moe_kernels.testing import relative_error
from tests.models.published_dit_moe import PublishedDiT, build, sample_ddpm

MODEL = "DiT-MoE-S/2-8E2A"
PUBLISHED_STEPS = 250  # of the published samples: the images a second are for so many
SCALE, GUIDED_CHANNELS = 1.5, 3
# In fp64 both compute the same but for the order of sums and fp32 sinusoids.
LARGEST_ERROR = 1e-5


class DifferentOutputs(RuntimeError):
    """The converted model does not compute what the published one does."""


def pair(quick: bool = False) -> tuple[DiT, PublishedDiT]:
    """The converted model, and the published one with the same weights."""
    config = get_config(MODEL)
    if quick:
        config = replace(config, depth=2, hidden_size=64, num_heads=2)
    published = build(config)
    with tempfile.TemporaryDirectory() as folder:
        container, converted = Path(folder) / "published.pt", Path(folder) / "ours"
        torch.save({"ema": published.state_dict()}, container)
        convert(container, converted, choices=Choices(num_heads=config.num_heads))
        model = load_pretrained(converted).backbone
    return model, published


def compare(model: DiT, published: PublishedDiT) -> float:
    """Relative error of one forward in fp64, where no near-tie is routed to another expert.

    Raises:
        DifferentOutputs: it is above ``LARGEST_ERROR``.
    """
    noise, labels = _inputs(model.config, 2)
    inputs = noise.double(), torch.full((2,), 500.0), labels
    model.double()
    published.double()
    try:
        with torch.inference_mode():
            error = relative_error(model(*inputs).sample, published(*inputs))
    finally:
        model.float()
        published.float()
    if not error < LARGEST_ERROR:
        raise DifferentOutputs(
            f"the converted model differs from the published one by {error:.2g} in fp64; at most "
            f"{LARGEST_ERROR:g} is rounding. Nothing was timed."
        )
    return error


def throughput(
    model: DiT,
    published: PublishedDiT,
    batch_sizes: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    steps: int,
    seconds: float,
    repeats: int,
) -> list[dict[str, Any]]:
    """Seconds of one guided step of both, in turns: a dictionary a batch size.

    ``ratio`` is the median of published over ours inside the rounds, with quartiles;
    ``images_per_second`` is for ``PUBLISHED_STEPS`` steps. ``dtype`` is that of both models'
    weights; the steps between their calls stay in fp32 and fp64.
    """
    model.to(dtype)
    published.to(dtype)
    # Ours takes latents of any dtype; a published model wants that of its weights.
    published.x_embedder.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
    found = []
    for batch_size in batch_sizes:
        runs = {
            "ours": _our_loop(model, batch_size, steps),
            "published": _published_loop(published, model.config, batch_size, steps),
        }
        difference = relative_error(*(run() for run in runs.values()))
        samplers = {name: _sampler(run, steps) for name, run in runs.items()}
        samples = measure(samplers, repeats=repeats, seconds=seconds)
        ratio = ratios(samples)["published"]
        step_seconds = {name: summarize(values).median for name, values in samples.items()}
        found.append(
            {
                "batch_size": batch_size,
                "seconds": step_seconds,
                "images_per_second": {
                    name: batch_size / PUBLISHED_STEPS / value
                    for name, value in step_seconds.items()
                },
                "ratio": ratio.median,
                "quartiles": [ratio.low, ratio.high],
                "rounds": len(samples["ours"]),
                "difference_of_samples": difference,
            }
        )
    return found


def _inputs(config: ModelConfig, batch_size: int) -> tuple[Tensor, Tensor]:
    """Noise and labels."""
    shape = (config.in_channels, config.image_size, config.image_size)
    labels = torch.arange(batch_size) * 123 % config.num_classes
    return noise_from_seeds(range(batch_size), shape), labels


def _our_loop(model: DiT, batch_size: int, steps: int) -> Callable[[], Tensor]:
    noise, labels = _inputs(model.config, batch_size)

    def run() -> Tensor:
        return generate(
            model,
            noise,
            objective=DDPM(),
            sampler="ddpm",
            num_steps=steps,
            cond={"labels": labels},
            uncond={"labels": torch.full_like(labels, model.config.num_classes)},
            guidance_scale=SCALE,
            guidance_channels=GUIDED_CHANNELS,
            seeds=range(batch_size),
        )

    return run


def _published_loop(
    published: PublishedDiT, config: ModelConfig, batch_size: int, steps: int
) -> Callable[[], Tensor]:
    noise, labels = _inputs(config, batch_size)
    _, channels, height, width = noise.shape
    timesteps = DDPM().sampling_timesteps(steps)

    def run() -> Tensor:
        drawn = StepNoise(range(batch_size), (channels, height, width))
        step_noise = [drawn.draw(noise.device) for _ in timesteps]
        return sample_ddpm(published, noise, labels, timesteps, SCALE, step_noise)

    return run


def _sampler(run: Callable[[], Tensor], steps: int) -> Sampler:
    """Times one step: ``steps`` of them in a row, divided by their number."""

    def sample(inner: int) -> float:
        with torch.inference_mode():
            start = perf_counter()
            for _ in range(inner):
                run()
            return (perf_counter() - start) / steps

    return sample
