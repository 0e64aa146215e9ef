"""An artist without a model: an image's plans depend on its seed alone, whatever its batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import moe_kernels as mk
from dit_models.analyze.collect import Subjects
from dit_models.drawing import Prompts

STEPS, LAYERS, EXPERTS, GRID = 4, 2, 5, (2, 3)
TOKENS = GRID[0] * GRID[1]


@dataclass
class StubArtist:
    """Draws grey of ``GRID`` times 2 pixels and reports made-up plans, guided or not."""

    guided: bool = True
    router: str = "expert_choice"
    decode: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        config = SimpleNamespace(patch_size=2)
        self.model = SimpleNamespace(backbone=SimpleNamespace(config=config))
        self.sampling = SimpleNamespace(num_steps=STEPS, sampler="euler", guidance_scale=2.0)
        self.objective = SimpleNamespace(max_timestep=10.0)
        self.device = torch.device("cpu")

    def plan(self, seeds: Sequence[int], step: int, layer: int) -> mk.RoutingPlan:
        """The plan of images with these seeds."""
        logits = torch.cat([self._logits(seed, step, layer) for seed in seeds])
        if self.guided:
            logits = torch.cat([logits, torch.randn_like(logits)])
        if self.router == "token_choice":
            return mk.token_choice(logits, 2)
        # One token an expert: some of the six have none.
        return mk.expert_choice(logits, 1.0, num_groups=len(logits) // TOKENS)

    def draw(self, prompts: Prompts, seeds: list[int], callback: Any) -> Tensor:
        """As ``Artist.draw``."""
        height, width = GRID[0] * 2, GRID[1] * 2
        with torch.inference_mode():
            images = torch.stack([torch.full((1, height, width), seed / 100) for seed in seeds])
            for step in range(STEPS):
                plans = tuple(self.plan(seeds, step, layer) for layer in range(LAYERS))
                callback(step, 10.0 - 2 * step, images, SimpleNamespace(plans=plans))
        return images if self.decode is None else self.decode(images)

    def _logits(self, seed: int, step: int, layer: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + 10 * step + layer)
        return torch.randn(TOKENS, EXPERTS, generator=generator)


def subjects(images: int, captions: Sequence[str] = ("red", "green", "blue")) -> Subjects:
    """Captions in turn, each its own group."""
    groups = [index % len(captions) for index in range(images)]
    prompts = Prompts(None, [captions[group] for group in groups])
    return Subjects(prompts, groups, list(captions), "prompt")
