"""Converted models draw what the published sampling loops draw with the published models."""

from dataclasses import replace

import pytest
import torch

from dit_models.convert import convert
from dit_models.diffusion import noise_from_seeds
from dit_models.diffusion.noise import StepNoise
from dit_models.drawing import Prompts
from dit_models.run_folder import load_run
from moe_kernels.testing import assert_as_accurate

from ...models.published_dit_moe import build, sample_ddpm, sample_flow
from .sources import HEADS, S_LIKE, XL_LIKE

SEEDS = [3, 4]
LABELS = torch.tensor([1, 4])
SHAPE = (4, 8, 8)
STEPS = 4
# Drawn images are clamped; latents divided by this are not reached by it.
SCALE = 2.0**20


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_the_published_loop(tmp_path, kind):
    published = build(XL_LIKE if kind == "flow" else S_LIKE)
    torch.save({"ema": published.state_dict()}, tmp_path / "source.pt")
    convert(tmp_path / "source.pt", tmp_path / "ours", choices=HEADS)
    artist = load_run(tmp_path / "ours", "cpu").artist
    assert artist.sampling.sampler == {"flow": "euler", "ddpm": "ddpm"}[kind]
    assert artist.sampling.guidance_channels == {"flow": None, "ddpm": 3}[kind]
    sampling = replace(artist.sampling, num_steps=STEPS)
    artist = replace(artist, sampling=sampling, decode=lambda latents: latents / SCALE)
    drawn = artist.draw(Prompts(LABELS, None), SEEDS) * SCALE

    noise = noise_from_seeds(SEEDS, SHAPE)
    step_noise = StepNoise(SEEDS, SHAPE)
    noises = [step_noise.draw(torch.device("cpu")) for _ in range(STEPS - 1)]
    timesteps = [999, 666, 333, 0]

    def loop(dtype):
        model = published.to(dtype)
        if kind == "flow":
            return sample_flow(model, noise.to(dtype), LABELS, STEPS, 1.5)
        return sample_ddpm(model, noise.to(dtype), LABELS, timesteps, 1.5, noises)

    assert_as_accurate(drawn, loop(torch.float32), loop(torch.float64))
