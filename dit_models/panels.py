"""Pictures of a run: sample grids, expert load, and experts per token laid over the samples."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_models.atomic import write_bytes
from dit_models.drawing import Artist, Prompts
from dit_models.extras import require


def image_grid(images: Tensor, columns: int, scale: int = 4, gap: int = 2) -> np.ndarray:
    """(n, C, H, W) images in [-1, 1] as one (height, width, 3) uint8 picture, row by row."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if pixels.shape[1] != 3:
        pixels = pixels[:, :1].expand(-1, 3, -1, -1)  # grey, or the first channel of latents
    tiles = pixels.permute(0, 2, 3, 1).numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = tiles.shape
    rows = -(-count // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, 3)
    picture = np.full(shape, 64, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top = gap + (index // columns) * (height + gap)
        left = gap + (index % columns) * (width + gap)
        picture[top : top + height, left : left + width] = tile
    return picture


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write a grid of images as PNG; small images are enlarged."""
    image_module = require("PIL.Image", extra="train")
    scale = max(1, 64 // images.shape[-1])
    stream = io.BytesIO()
    image_module.fromarray(image_grid(images, columns, scale)).save(stream, format="PNG")
    write_bytes(path, stream.getvalue())


class RoutingRecord(NamedTuple):
    """Routing of one drawn batch.

    Attributes:
        images: (n, C, H, W) the finished samples.
        noise_levels: the recorded noise levels, 1 is pure noise.
        experts_per_token: (levels, layers, n, rows, columns) of the image's token grid.
        row_share: (layers, E) share of expert rows that each expert processed, over all steps.
        weight_share: (layers, E) share of the routing weight that each expert gave.
    """

    images: Tensor
    noise_levels: list[float]
    experts_per_token: Tensor
    row_share: Tensor
    weight_share: Tensor


def record_routing(
    artist: Artist, prompts: Prompts, seeds: list[int], levels: int = 3
) -> RoutingRecord | None:
    """Draw images and note how they were routed; ``None`` for a model without MoE layers."""
    config = artist.model.backbone.config
    count, steps = len(seeds), artist.sampling.num_steps
    _, height, width = artist.image_shape
    grid = (height // config.patch_size, width // config.patch_size)
    wanted = {round(i * (steps - 1) / max(levels - 1, 1)) for i in range(levels)}
    maps: list[Tensor] = []
    noise_levels: list[float] = []
    rows: list[Tensor] = []
    weights: list[Tensor] = []

    def note(step: int, timestep: float, x: Tensor, output: Any) -> None:
        if not output.plans:
            return
        rows.append(torch.stack([plan.tokens_per_expert.float().cpu() for plan in output.plans]))
        weights.append(torch.stack([_weight_by_expert(plan).cpu() for plan in output.plans]))
        if step in wanted:
            # With guidance the first half of the batch is the conditional one.
            chosen = [plan.experts_per_token.cpu()[: count * grid[0] * grid[1]]
                      for plan in output.plans]  # fmt: skip
            maps.append(torch.stack([each.view(count, *grid) for each in chosen]))
            noise_levels.append(timestep / artist.objective.max_timestep)

    images = artist.draw(prompts, seeds, callback=note)
    if not maps:
        return None
    row_sum, weight_sum = torch.stack(rows).sum(0), torch.stack(weights).sum(0)
    return RoutingRecord(
        images,
        noise_levels,
        torch.stack(maps),
        row_sum / row_sum.sum(1, keepdim=True),
        weight_sum / weight_sum.sum(1, keepdim=True).clamp_min(1e-30),
    )


def _weight_by_expert(plan: Any) -> Tensor:
    rows = torch.arange(plan.num_experts, device=plan.expert_offsets.device).unsqueeze(1)
    mine = plan.expert_of_row.unsqueeze(0) == rows  # (E, R)
    return torch.where(mine, plan.routing_weights.float(), 0.0).sum(dim=1)


def save_expert_load(path: Path, record: RoutingRecord) -> None:
    """Write the load panel: share of rows and share of routing weight, layer by expert."""
    figure, axes = _figure(1, 2, (9, 1.6 + 0.45 * len(record.row_share)))
    titles = ("share of expert rows", "share of routing weight")
    for axis, share, title in zip(
        axes.flat, (record.row_share, record.weight_share), titles, strict=True
    ):
        experts = share.shape[1]
        shown = axis.imshow(
            (share * experts).numpy(), vmin=0, vmax=2, cmap="coolwarm", aspect="auto"
        )
        axis.set(title=f"{title} x E", xlabel="expert", ylabel="MoE layer")
        axis.set_xticks(range(experts))
        axis.set_yticks(range(share.shape[0]))
        figure.colorbar(shown, ax=axis, label="1 = balanced")
    _save(figure, path)


def save_experts_per_token(path: Path, record: RoutingRecord, images: int = 4) -> None:
    """Write the heat maps: how many experts process each token, over the finished samples.

    A block of columns an image, one for each recorded noise level; a row a MoE layer, below the
    sample itself.
    """
    maps = record.experts_per_token[:, :, :images].numpy()
    levels, layers, count = maps.shape[:3]
    pixels = ((record.images[:count].clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1:3]
    figure, axes = _figure(layers + 1, count * levels, (1.1 * count * levels, 1.25 * (layers + 1)))
    heat = None
    for index in range(count):
        shown = pixels[index] if pixels.shape[3] == 3 else pixels[index, ..., 0]
        for level in range(levels):
            column = axes[:, index * levels + level]
            if level == levels // 2:
                column[0].imshow(shown, cmap="gray", vmin=0, vmax=1)
            for layer in range(layers):
                axis = column[layer + 1]
                axis.imshow(shown, cmap="gray", vmin=0, vmax=1)
                heat = axis.imshow(
                    maps[level, layer, index], cmap="inferno", alpha=0.65, vmin=0,
                    vmax=max(maps.max(), 1), extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                )  # fmt: skip
            column[1].set_title(f"noise {record.noise_levels[level]:.2f}", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for layer in range(layers):
        axes[layer + 1, 0].set_ylabel(f"MoE layer {layer}", fontsize=8)
    figure.colorbar(heat, ax=axes, label="experts per token", shrink=0.7)
    _save(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    # Figure and canvas by hand: pyplot would keep global state and look for a display.
    figure_module = require("matplotlib.figure", extra="train")
    figure = figure_module.Figure(figsize=size, layout="constrained")
    require("matplotlib.backends.backend_agg", extra="train").FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    write_bytes(path, stream.getvalue())
