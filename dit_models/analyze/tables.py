"""From counts to shares: what the figures show, as arrays with names."""

from typing import Any

import numpy as np

from dit_models.analyze.collect import Analysis
from dit_models.analyze.counts import RoutingCounts

Arrays = dict[str, np.ndarray]


def share(counts: np.ndarray) -> np.ndarray:
    """Counts divided by their sum over the last axis; NaN where that is 0."""
    total = counts.sum(axis=-1, keepdims=True).astype(np.float64)
    return _divide(counts, total)


def equal_rows(counts: RoutingCounts) -> bool:
    """Whether all experts have the same rows for every class: so it is in expert choice.

    Then the share of rows is 1/E everywhere, and the share of routing weight is what differs.
    """
    rows = counts.rows_by_group
    return bool((rows == rows[..., :1]).all())


def co_selection(pairs: np.ndarray) -> np.ndarray:
    """(L, E, E) Pr(expert j has the token | expert i has it) = n[i, j] / n[i, i].

    NaN in the row of an expert that took no token.
    """
    own = np.diagonal(pairs, axis1=1, axis2=2)
    return _divide(pairs, own[:, :, None].astype(np.float64))


def tables_of(analysis: Analysis) -> dict[str, Arrays]:
    """The arrays of each figure's ``.npz``; docs/analysis.md has the formulae.

    Returns:
        File stem -> name -> array. Integers are exact counts, ``*_share`` and the like are derived.
    """
    counts = analysis.counts
    names = np.array(analysis.subjects.group_names)
    rows = counts.rows_by_group.numpy()
    weight = counts.weight_by_group.numpy()
    layers, _, experts = rows.shape
    grid = analysis.grid
    images = counts.num_images
    steps = len(analysis.noise_levels)
    when: Arrays = {
        "noise_levels": np.array(analysis.noise_levels),
        "timesteps": np.array(analysis.timesteps),
    }
    position = counts.rows_by_position.numpy().reshape(layers, *grid, experts)
    by_step = counts.rows_by_step.numpy()
    weight_by_step = counts.weight_by_step.numpy()
    histogram = counts.tokens_by_count.numpy()
    pairs = counts.pairs.numpy()
    visible = analysis.maps
    tokens = float(images * counts.tokens)
    return {
        "class_by_expert": {
            "classes": names,
            "images": counts.images_by_group.numpy(),
            "rows": rows,
            "weight": weight,
            "rows_share": share(rows),
            "weight_share": share(weight),
        },
        "position_by_expert": {
            "rows": position,
            "probability": position / float(images * steps),
        },
        "timestep_by_expert": {
            **when,
            "rows": by_step,
            "weight": weight_by_step,
            "rows_share": share(by_step),
            "weight_share": share(weight_by_step),
        },
        "experts_per_token": {
            "steps": np.array(visible.steps),
            **{name: values[visible.steps] for name, values in when.items()},
            "experts_per_token": visible.experts_per_token,
            "entropy": visible.entropy,
            "top_expert": visible.top_expert,
            "images": analysis.images.numpy(),
            "titles": np.array(analysis.titles),
            "mean": counts.experts_by_position.numpy().reshape(steps, layers, *grid) / images,
        },
        "load": {
            "rows": by_step.sum(axis=0),
            "weight": weight_by_step.sum(axis=0),
            "rows_share": share(by_step.sum(axis=0)),
            "weight_share": share(weight_by_step.sum(axis=0)),
        },
        "entropy": {
            **when,
            "entropy": counts.entropy_by_step.numpy() / tokens,
            "maximum": np.array(np.log(experts)),
        },
        "coverage": {
            **when,
            "tokens_by_count": histogram,
            "unrouted_share": histogram[..., 0] / tokens,
            "most_experts_share": _most(histogram) / experts,
            "histogram": share(histogram.sum(axis=0)),
        },
        "co_selection": {"pairs": pairs, "probability": co_selection(pairs)},
    }


def layer_summary(tables: dict[str, Arrays]) -> list[dict[str, Any]]:
    """The figures of each MoE layer over all steps and images, for ``summary.json``."""
    load, coverage = tables["load"], tables["coverage"]
    entropy = tables["entropy"]["entropy"].mean(axis=0)
    experts = load["rows"].shape[1]
    summary = []
    for layer, rows in enumerate(load["rows_share"]):
        mean_held = float(coverage["histogram"][layer] @ np.arange(experts + 1))
        summary.append(
            {
                "layer": layer,
                "largest_rows_share": _number(rows.max()),
                "smallest_rows_share": _number(rows.min()),
                "largest_weight_share": _number(load["weight_share"][layer].max()),
                "smallest_weight_share": _number(load["weight_share"][layer].min()),
                "experts_without_rows": int((load["rows"][layer] == 0).sum()),
                "entropy_nats": _number(entropy[layer]),
                "experts_per_token": _number(mean_held),
                "unrouted_share": _number(coverage["unrouted_share"][:, layer].mean()),
                "most_experts_share": _number(coverage["most_experts_share"][:, layer].max()),
            }
        )
    return summary


def _most(histogram: np.ndarray) -> np.ndarray:
    """The largest number of experts that any token had: the last bin that is not empty."""
    bins = histogram.shape[-1]
    return bins - 1 - np.argmax(histogram[..., ::-1] > 0, axis=-1)


def _number(value: Any) -> float | None:
    """JSON has no NaN."""
    return round(float(value), 6) if np.isfinite(value) else None


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    shape = np.broadcast_shapes(part.shape, whole.shape)
    return np.divide(part, whole, out=np.full(shape, np.nan), where=whole != 0)
