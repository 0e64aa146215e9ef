"""Pictures of a run: sample grids, expert load, and experts per token laid over the samples."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_models.analyze.counts import by_token
from dit_models.atomic import write_bytes
from dit_models.drawing import Artist, Prompts
from dit_models.extras import require


def display_pixels(images: Tensor) -> np.ndarray:
    """(n, C, H, W) images in [-1, 1] as (n, H, W, 3) uint8.

    One channel is grey; of four or more, which are latents that nobody decoded, the first is shown.
    """
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if pixels.shape[1] != 3:
        pixels = pixels[:, :1].expand(-1, 3, -1, -1)
    return pixels.permute(0, 2, 3, 1).numpy()


def image_grid(images: Tensor, columns: int, scale: int = 4, gap: int = 2) -> np.ndarray:
    """(n, C, H, W) images in [-1, 1] as one (height, width, 3) uint8 picture, row by row."""
    tiles = display_pixels(images).repeat(scale, axis=1).repeat(scale, axis=2)
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
        row_share: (layers, E) share of expert rows that each expert processed, over all steps;
            with guidance in the conditional half.
        weight_share: (layers, E) share of the routing weight that each expert gave, likewise.
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
    count, steps = len(seeds), artist.sampling.num_steps
    patch_size = artist.model.backbone.config.patch_size
    wanted = {round(i * (steps - 1) / max(levels - 1, 1)) for i in range(levels)}
    maps: list[Tensor] = []
    noise_levels: list[float] = []
    rows: list[Tensor] = []
    weights: list[Tensor] = []

    def note(step: int, timestep: float, x: Tensor, output: Any) -> None:
        if not output.plans:
            return
        # With guidance the first half of the batch is the conditional one.
        grid = (x.shape[2] // patch_size, x.shape[3] // patch_size)
        tables = [by_token(plan, count, grid[0] * grid[1]) for plan in output.plans]
        rows.append(torch.stack([each.chosen.sum((0, 1)) for each in tables]).double())
        weights.append(torch.stack([each.weights.double().sum((0, 1)) for each in tables]))
        if step in wanted:
            maps.append(torch.stack([each.chosen.sum(2).view(count, *grid) for each in tables]))
            noise_levels.append(timestep / artist.objective.max_timestep)

    images = artist.draw(prompts, seeds, callback=note)
    if not maps:
        return None
    row_sum, weight_sum = torch.stack(rows).sum(0).cpu(), torch.stack(weights).sum(0).cpu()
    return RoutingRecord(
        images,
        noise_levels,
        torch.stack(maps).cpu(),
        (row_sum / row_sum.sum(1, keepdim=True)).float(),
        (weight_sum / weight_sum.sum(1, keepdim=True).clamp_min(1e-30)).float(),
    )


def save_expert_load(path: Path, record: RoutingRecord) -> None:
    """Write the load panel: share of rows and share of routing weight, layer by expert."""
    figure, axes = new_figure(1, 2, (9, 1.6 + 0.45 * len(record.row_share)))
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
    save_figure(figure, path)


def save_experts_per_token(path: Path, record: RoutingRecord, images: int = 4) -> None:
    """Write the heat maps: how many experts process each token, over the finished samples.

    A block of columns an image, one for each recorded noise level; a row a MoE layer, below the
    sample itself.
    """
    maps = record.experts_per_token[:, :, :images].numpy()
    names = [f"MoE layer {layer}" for layer in range(maps.shape[1])]
    pixels = display_pixels(record.images[: maps.shape[2]])
    save_figure(token_maps_figure(maps, pixels, record.noise_levels, names, across=4), path)


def token_maps_figure(
    maps: np.ndarray,
    pixels: np.ndarray,
    noise_levels: Sequence[float],
    layer_names: Sequence[str],
    across: int,
) -> Any:
    """Heat maps of tokens over images, a block an image: the image, and below it its maps.

    Args:
        maps: (levels, layers, n, rows, columns) experts of each token.
        pixels: (n, H, W, 3) uint8.
        noise_levels: of the first axis of ``maps``.
        layer_names: of the second.
        across: images side by side.
    """
    levels, layers, count = maps.shape[:3]
    across = min(across, count)
    down = -(-count // across)
    height, width = pixels.shape[1:3]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    size = (1.05 * across * levels + 1, (1.05 * (layers + 1) + 0.3) * down)
    figure, _ = new_figure(0, 0, size)
    # A narrow column after each block: a gap, and in the end the colour bar.
    blocks = figure.add_gridspec(down, 2 * across, width_ratios=[1, 0.1 / levels] * across)
    largest = max(maps.max(), 1)
    heat = None
    for index in range(count):
        where = blocks[index // across, 2 * (index % across)].subgridspec(layers + 1, levels)
        picture = figure.add_subplot(where[0, levels // 2])
        picture.imshow(pixels[index])
        _hide_ticks(picture)
        for layer in range(layers):
            for level in range(levels):
                axis = figure.add_subplot(where[layer + 1, level])
                axis.imshow(pixels[index])
                heat = axis.imshow(maps[level, layer, index], cmap="inferno", alpha=0.65,
                                   vmin=0, vmax=largest, extent=extent)  # fmt: skip
                _hide_ticks(axis)
                if layer == 0:
                    axis.set_title(f"noise {noise_levels[level]:.2f}", fontsize=8)
                if level == 0 and index % across == 0:
                    axis.set_ylabel(layer_names[layer], fontsize=8)
    bar = figure.colorbar(heat, cax=figure.add_subplot(blocks[:, -1]), label="experts per token")
    bar.locator = require("matplotlib.ticker", extra="train").MaxNLocator(integer=True)
    return figure


def _hide_ticks(axis: Any) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A matplotlib figure of ``size`` inches, and its (rows, columns) array of axes.

    With no rows it has none yet.
    """
    # Figure and canvas by hand: pyplot would keep global state and look for a display.
    figure_module = require("matplotlib.figure", extra="train")
    figure = figure_module.Figure(figsize=size, layout="constrained")
    require("matplotlib.backends.backend_agg", extra="train").FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False) if rows else None


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, in one step."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    write_bytes(path, stream.getvalue())
