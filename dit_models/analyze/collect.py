"""Draw images batch after batch and count how they were routed."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_models.analyze.counts import RoutingCounts, by_token, check_plans, token_entropy
from dit_models.analyze.spacing import spaced
from dit_models.drawing import Artist, Prompts

NOBODY = -1  # in ``TokenMaps.top_expert``: no expert took the token


@dataclass(frozen=True)
class Subjects:
    """What to draw and how to group it.

    Attributes:
        prompts: n labels or captions.
        groups: the group of each, an index into ``group_names``.
        group_names: names of the classes or groups of prompts.
        kind: what a group is, for axis labels: "class" or "prompt".
    """

    prompts: Prompts
    groups: list[int]
    group_names: list[str]
    kind: str

    def title(self, index: int) -> str:
        """What image ``index`` shows."""
        if self.prompts.captions is not None:
            return self.prompts.captions[index]
        return f"{self.kind} {self.group_names[self.groups[index]]}"


@dataclass(frozen=True)
class TokenMaps:
    """Routing of the first images, token by token, at some of the steps.

    Attributes:
        steps: the steps shown.
        experts_per_token: (shown steps, L, n, rows, columns) int16.
        entropy: the same shape, float32, nats; NaN where the plan has no logits.
        top_expert: the same shape, int16: of the experts that process the token the one with the
            largest routing weight; ``NOBODY`` where there is none.
    """

    steps: list[int]
    experts_per_token: np.ndarray
    entropy: np.ndarray
    top_expert: np.ndarray


@dataclass(frozen=True)
class Analysis:
    """Everything that the figures and the page show.

    Attributes:
        counts: sums over all images, on the CPU.
        grid: rows and columns of an image's tokens.
        noise_levels: of every step, 1 is pure noise.
        timesteps: of every step, in the objective's unit.
        maps: of the first images.
        images: (n, C, H, W) in [-1, 1], the first images.
        titles: what they show.
        subjects: what was to be drawn.
        complete: whether all of it was.
    """

    counts: RoutingCounts
    grid: tuple[int, int]
    noise_levels: list[float]
    timesteps: list[float]
    maps: TokenMaps
    images: Tensor
    titles: list[str]
    subjects: Subjects
    complete: bool


class Stopped(Exception):
    """Raised inside a batch to leave it."""


def collect(
    artist: Artist,
    subjects: Subjects,
    *,
    seed: int = 0,
    batch_size: int = 32,
    shown: int = 4,
    shown_steps: int = 25,
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[int], Any] = lambda steps: None,
) -> Analysis | None:
    """Draw ``subjects`` and count their routing.

    With guidance only the conditional predictions are counted. A sampler that calls the model
    twice in a step (heun) is counted at its first call.

    Args:
        artist: the model to draw from.
        subjects: what to draw.
        seed: image i is drawn from seed + i.
        batch_size: images drawn at a time.
        shown: images whose token maps are kept, from the first on.
        shown_steps: steps at which they are kept, evenly spaced, first and last included.
        stopping: asked after every step; true ends the work at once, and the images of the batch
            under way are not counted.
        progress: called after every step of a batch with the number of its images.

    Returns:
        The analysis, or ``None`` when it was stopped before the first batch was done.

    Raises:
        ValueError: for a dense model, or numbers out of range.
    """
    for name, value in (("batch_size", batch_size), ("shown", shown), ("shown_steps", shown_steps)):
        if value < 1:
            raise ValueError(f"{name}={value}; expected at least 1.")
    if not len(subjects.prompts):
        raise ValueError("nothing to draw; give at least one class or caption.")
    largest = 2**32 - len(subjects.prompts)
    if not 0 <= seed <= largest:  # else the last batch would find out
        raise ValueError(
            f"seed={seed} with {len(subjects.prompts)} images; expected 0 to {largest}."
        )
    total: RoutingCounts | None = None
    pieces: list[_Batch] = []  # of the images shown
    first: _Batch | None = None
    complete = True
    for start in range(0, len(subjects.prompts), batch_size):
        part = subjects.prompts.part(start, start + batch_size)
        groups = torch.tensor(subjects.groups[start : start + batch_size])
        batch = _Batch(
            artist,
            groups.to(artist.device),
            len(subjects.group_names),
            max(0, min(shown - start, len(part))),
            spaced(artist.sampling.num_steps, shown_steps),
            stopping,
            progress,
        )
        seeds = list(range(seed + start, seed + start + len(part)))
        try:
            images = _decoding_only(artist, batch.shown).draw(part, seeds, callback=batch.note)
        except Stopped:
            complete = False
            break
        assert batch.counts is not None
        batch.counts.add_images(batch.groups)
        first = first or batch
        if batch.shown:
            batch.images = images[: batch.shown]
            pieces.append(batch)
        if total is None:
            total = batch.counts
        else:
            total.merge(batch.counts)
    if total is None or first is None:
        return None
    maps = TokenMaps(
        first.map_steps,
        *(
            np.concatenate([_stack(getattr(batch, name)) for batch in pieces], axis=2)
            for name in ("experts_per_token", "entropy", "top_expert")
        ),
    )
    images = torch.cat([batch.images for batch in pieces])
    return Analysis(
        total.to_cpu(),
        first.grid,
        first.noise_levels,
        first.timesteps,
        maps,
        images,
        [subjects.title(index) for index in range(len(images))],
        subjects,
        complete,
    )


def _decoding_only(artist: Artist, count: int) -> Artist:
    """The artist, whose VAE decodes the first ``count`` images: the others are not shown."""
    decode = artist.decode
    if decode is None:
        return artist
    return replace(artist, decode=lambda latents: decode(latents[:count]) if count else latents[:0])


def _stack(maps: list[list[Tensor]]) -> np.ndarray:
    return torch.stack([torch.stack(layers) for layers in maps]).cpu().numpy()


@dataclass
class _Batch:
    """One batch under way: its counts, and the maps of its shown images."""

    artist: Artist
    groups: Tensor
    num_groups: int
    shown: int
    map_steps: list[int]
    stopping: Callable[[], bool]
    progress: Callable[[int], Any]
    counts: RoutingCounts | None = None
    grid: tuple[int, int] = (0, 0)
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    noise_levels: list[float] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    experts_per_token: list[list[Tensor]] = field(default_factory=list)
    entropy: list[list[Tensor]] = field(default_factory=list)
    top_expert: list[list[Tensor]] = field(default_factory=list)

    def note(self, step: int, timestep: float, x: Tensor, output: Any) -> None:
        """The callback of ``Artist.draw``; x holds the n images of the conditional half."""
        if self.stopping():
            raise Stopped
        plans = output.plans
        experts = check_plans(plans)
        patch_size = self.artist.model.backbone.config.patch_size
        self.grid = (x.shape[2] // patch_size, x.shape[3] // patch_size)
        images, tokens = x.shape[0], self.grid[0] * self.grid[1]
        if self.counts is None:
            steps = self.artist.sampling.num_steps
            with torch.inference_mode(False):  # these sums outlive the drawing
                self.counts = RoutingCounts(
                    len(plans), experts, steps, tokens, self.num_groups, x.device
                )
        self.timesteps.append(float(timestep))
        self.noise_levels.append(float(timestep) / self.artist.objective.max_timestep)
        mapped = self.shown and step in self.map_steps
        if mapped:
            for maps in (self.experts_per_token, self.entropy, self.top_expert):
                maps.append([])
        for layer, plan in enumerate(plans):
            table = by_token(plan, images, tokens)
            entropy = token_entropy(plan, images, tokens)
            self.counts.add(step, layer, table, entropy, self.groups)
            if mapped:
                held = table.chosen[: self.shown].sum(dim=2)
                best = table.weights[: self.shown].masked_fill(
                    table.chosen[: self.shown] == 0, -torch.inf
                )
                top = torch.where(held > 0, best.argmax(dim=2), NOBODY)
                shape = (self.shown, *self.grid)
                self.experts_per_token[-1].append(held.to(torch.int16).view(shape))
                self.entropy[-1].append(entropy[: self.shown].view(shape))
                self.top_expert[-1].append(top.to(torch.int16).view(shape))
        self.progress(images)
