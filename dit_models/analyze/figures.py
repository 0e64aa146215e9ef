"""The figures as matplotlib figures, one function each, from the tables that are saved beside."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dit_models.analyze.spacing import spaced
from dit_models.analyze.tables import Arrays
from dit_models.extras import require
from dit_models.panels import display_pixels, new_figure, token_maps_figure

_LAYERS_SHOWN = 12  # rows of position by expert, half of them over images; the .npz holds all
_EXPERTS_SHOWN = 16  # columns of position by expert
_STEPS_SHOWN = 5  # columns for each image of the heat maps


def class_by_expert(tables: dict[str, Arrays], kind: str, measure: str) -> Any:
    """Share of each expert in the rows (or weight) of a class, a panel a layer."""
    table = tables["class_by_expert"]
    values, names = table[f"{measure}_share"], [_short(name) for name in table["classes"].tolist()]
    classes, experts = values.shape[1:]
    figure, axes = _panels(
        len(values), 0.5 + min(0.22 * experts, 4.0), 0.6 + min(max(0.19 * classes, 1.3), 5.0), 2.0
    )
    shown = _heat(axes, values, "MoE layer {}")
    for panel in axes:
        _expert_ticks(panel.xaxis, experts)
        panel.set_xlabel("expert", fontsize=8)
        if panel.get_subplotspec().is_first_col():
            ticks = spaced(classes, min(classes, 30))
            panel.set_yticks(ticks)
            panel.set_yticklabels([names[tick] for tick in ticks], fontsize=7, parse_math=False)
            panel.set_ylabel(kind, fontsize=8)
        else:
            panel.set_yticks([])
    _title(figure, f"{_MEASURES[measure]} of a {kind}, by expert")
    _colorbar(figure, shown, axes, _share_label(experts))
    return figure


def position_by_expert(tables: dict[str, Arrays], kind: str, measure: str) -> Any:
    """Probability that an expert holds the token at a position: layers down, experts across."""
    values = tables["position_by_expert"]["probability"]
    layers, rows, columns, experts = values.shape
    down, across = spaced(layers, _LAYERS_SHOWN), spaced(experts, _EXPERTS_SHOWN)
    figure, axes = new_figure(
        len(down), len(across), (1.5 + 0.72 * len(across), 0.8 + 0.74 * len(down) * rows / columns)
    )
    shown = None
    for axis_row, layer in zip(axes, down, strict=True):
        for axis, expert in zip(axis_row, across, strict=True):
            shown = axis.imshow(
                values[layer, :, :, expert], cmap="viridis", vmin=0, vmax=_top(values)
            )
            _bare(axis)
        axis_row[0].set_ylabel(f"layer {layer}", fontsize=8)
    for axis, expert in zip(axes[0], across, strict=True):
        axis.set_title(f"expert {expert}", fontsize=7)
    left_out = "" if (len(down), len(across)) == (layers, experts) else " (some of them)"
    _title(figure, f"where in the image each expert works{left_out}")
    _colorbar(figure, shown, axes, "probability that it holds the token", width=0.02)
    return figure


def timestep_by_expert(tables: dict[str, Arrays], kind: str, measure: str) -> Any:
    """Share of each expert at every step, a panel a layer, noise on the left."""
    table = tables["timestep_by_expert"]
    values = table[f"{measure}_share"].transpose(1, 2, 0)  # (L, E, steps)
    experts = values.shape[1]
    figure, axes = _panels(len(values), 3.0, 0.7 + min(0.18 * experts, 2.6), 0.5)
    shown = _heat(axes, values, "MoE layer {}", interpolation="nearest")
    for panel in axes:
        _expert_ticks(panel.yaxis, experts)
        _noise_ticks(panel, table["noise_levels"])
    axes[0].set_ylabel("expert", fontsize=8)
    _title(figure, f"{_MEASURES[measure]} at a step, by expert")
    _colorbar(figure, shown, axes, _share_label(experts))
    return figure


def experts_per_token(tables: dict[str, Arrays], kind: str, measure: str) -> Any:
    """Experts of each token laid over the first images, layers down, steps across."""
    table = tables["experts_per_token"]
    maps = table["experts_per_token"]
    steps, layers = spaced(maps.shape[0], _STEPS_SHOWN), spaced(maps.shape[1], _LAYERS_SHOWN // 2)
    images = min(maps.shape[2], 4)
    return token_maps_figure(
        maps[steps][:, layers, :images],
        display_pixels(torch.from_numpy(table["images"][:images])),
        table["noise_levels"][steps].tolist(),
        [f"layer {layer}" for layer in layers],
        across=2,
    )


def load(tables: dict[str, Arrays], kind: str, measure: str) -> Any:
    """Share of rows and of routing weight, layers down, experts across."""
    table = tables["load"]
    layers, experts = table["rows"].shape
    size = (3.0 + min(0.5 * experts, 11.0), 1.3 + 0.3 * layers)
    figure, axes = new_figure(1, 2, size)
    parts = [table["rows_share"] * experts, table["weight_share"] * experts]
    limit = max(2.0, _top(np.stack(parts)))
    colors = require("matplotlib.colors", extra="train")
    balanced_is_white = colors.TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=limit)
    shown = None
    for axis, values, title in zip(axes.flat, parts, _MEASURES.values(), strict=True):
        shown = axis.imshow(values, norm=balanced_is_white, cmap="coolwarm", aspect="auto")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("expert", fontsize=8)
        _expert_ticks(axis.xaxis, experts)
        _layer_ticks(axis, layers)
    axes[0, 0].set_ylabel("MoE layer", fontsize=8)
    _colorbar(figure, shown, axes, "share · E (1 = balanced)")
    return figure


def entropy(tables: dict[str, Arrays], kind: str, measure: str) -> Any:
    """Mean entropy of a token's routing distribution, a line a layer, over the steps."""
    table = tables["entropy"]
    figure, axes = new_figure(1, 1, (6.5, 3.2))
    axis = axes[0, 0]
    _lines(axis, table["noise_levels"], table["entropy"])
    top = float(table["maximum"])
    axis.axhline(top, color="gray", linestyle="--", linewidth=1)
    axis.text(0.0, top, " log E", color="gray", fontsize=8, va="bottom", ha="right")
    axis.set_ylim(0, top * 1.1 + 1e-9)
    axis.set_ylabel("router entropy (nats)", fontsize=8)
    _layer_legend(figure, axis)
    return figure


def coverage(tables: dict[str, Arrays], kind: str, measure: str) -> Any:
    """Tokens that nobody took, the most experts on one token, and the histogram between."""
    table = tables["coverage"]
    largest = int(np.flatnonzero(table["histogram"].any(axis=0)).max())
    histogram = table["histogram"][:, : largest + 1]
    layers, bins = histogram.shape
    figure, axes = new_figure(1, 3, (12.5, min(max(3.2, 1.3 + 0.28 * layers), 4.6)))
    unrouted, most, held = axes.flat
    _lines(unrouted, table["noise_levels"], table["unrouted_share"])
    unrouted.set_title("tokens without an expert", fontsize=9)
    unrouted.set_ylabel("share of tokens", fontsize=8)
    unrouted.set_ylim(bottom=0, top=max(0.05, 1.08 * float(table["unrouted_share"].max())))
    _lines(most, table["noise_levels"], table["most_experts_share"])
    most.set_title("most experts on one token", fontsize=9)
    most.set_ylabel("share of the experts", fontsize=8)
    most.set_ylim(0, 1.04)
    shown = held.imshow(histogram, cmap="viridis", vmin=0, aspect="auto")
    held.set_title("experts per token", fontsize=9)
    held.set_xlabel("number of experts", fontsize=8)
    held.set_ylabel("MoE layer", fontsize=8)
    _expert_ticks(held.xaxis, bins)
    _layer_ticks(held, layers)
    _colorbar(figure, shown, held, "share of tokens")
    _layer_legend(figure, unrouted)
    return figure


def co_selection(tables: dict[str, Arrays], kind: str, measure: str) -> Any:
    """Pr(expert j has the token | expert i has it), a panel a layer."""
    values = tables["co_selection"]["probability"]
    experts = values.shape[1]
    side = 0.7 + min(max(0.2 * experts, 1.2), 2.4)
    figure, axes = _panels(len(values), side, side, 0.4)
    away = np.where(np.eye(experts, dtype=bool), np.nan, values)
    shown = _heat(axes, away, "MoE layer {}", aspect="equal")
    for panel in axes:
        _expert_ticks(panel.xaxis, experts)
        _expert_ticks(panel.yaxis, experts)
        panel.set_xlabel("expert j", fontsize=8)
    axes[0].set_ylabel("expert i", fontsize=8)
    _title(figure, "Pr(j has the token | i has it); the diagonal, 1, is left out")
    _colorbar(figure, shown, axes, "probability")
    return figure


# (tables, what a group is, "rows" or "weight") -> figure; the names are those of the tables.
FIGURES: dict[str, Callable[[dict[str, Arrays], str, str], Any]] = {
    "class_by_expert": class_by_expert,
    "position_by_expert": position_by_expert,
    "timestep_by_expert": timestep_by_expert,
    "experts_per_token": experts_per_token,
    "load": load,
    "entropy": entropy,
    "coverage": coverage,
    "co_selection": co_selection,
}

_MEASURES = {"rows": "share of expert rows", "weight": "share of routing weight"}


def _panels(count: int, width: float, height: float, left: float) -> tuple[Any, list[Any]]:
    """A figure with ``count`` panels of that size in inches, up to six across."""
    down = -(-count // min(6, max(1, int(16 / width))))
    across = -(-count // down)  # rows of equal length, as far as that goes
    figure, axes = new_figure(down, across, (width * across + left + 0.9, height * down + 0.5))
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    return figure, list(axes.flat[:count])


def _heat(axes: Sequence[Any], values: np.ndarray, title: str, **options: Any) -> Any:
    options = {"aspect": "auto", **options}
    shown = None
    for index, (axis, panel) in enumerate(zip(axes, values, strict=True)):
        axis.set_facecolor("lightgray")  # what was not counted
        shown = axis.imshow(panel, cmap="viridis", vmin=0, vmax=_top(values), **options)
        axis.set_title(title.format(index), fontsize=8)
    return shown


def _top(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def _lines(axis: Any, noise_levels: np.ndarray, values: np.ndarray) -> None:
    """(steps, L) values against the noise level, pure noise on the left as in sampling."""
    layers = values.shape[1]
    colors = require("matplotlib", extra="train").colormaps["viridis"](np.linspace(0, 0.92, layers))
    for layer in range(layers):
        axis.plot(noise_levels, values[:, layer], color=colors[layer], label=f"layer {layer}",
                  marker="." if len(noise_levels) <= 25 else None)  # fmt: skip
    axis.set_xlim(1.02, -0.02)
    axis.set_xlabel("noise level", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _layer_legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right upper", fontsize=8, frameon=False,
        ncols=1 + (len(labels) - 1) // 14,
    )  # fmt: skip


def _expert_ticks(axis: Any, experts: int) -> None:
    axis.set_ticks(range(0, experts, 1 if experts <= 16 else -(-experts // 64) * 8))
    axis.set_tick_params(labelsize=7)


def _layer_ticks(axis: Any, layers: int) -> None:
    axis.set_yticks(spaced(layers, 20))
    axis.tick_params(axis="y", labelsize=7)


def _noise_ticks(axis: Any, noise_levels: np.ndarray) -> None:
    ticks = spaced(len(noise_levels), 4)
    axis.set_xticks(ticks)
    axis.set_xticklabels([f"{noise_levels[tick]:.2f}" for tick in ticks], fontsize=7)
    axis.set_xlabel("noise level", fontsize=8)


def _bare(axis: Any) -> None:
    axis.set_xticks([])
    axis.set_yticks([])


def _title(figure: Any, text: str) -> None:
    figure.suptitle(text, fontsize=10)


def _share_label(experts: int) -> str:
    return f"share (1/E = {1 / experts:.3g})"


def _colorbar(figure: Any, shown: Any, axes: Any, label: str, width: float = 0.04) -> None:
    aspect = max(15, 6 * figure.get_figheight())  # as thin beside a tall figure as beside a low one
    bar = figure.colorbar(shown, ax=axes, fraction=width, pad=0.02, aspect=aspect)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _short(name: str) -> str:
    return name if len(name) <= 30 else f"{name[:15]} … {name[-12:]}"
