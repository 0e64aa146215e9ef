"""A plan in words: tables, the reason for the recommendation, and JSON."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from dit_models.models import get_config
from dit_models.plan.settings import Cluster, Run
from dit_models.plan.times import Estimate, break_even_images, flow_seconds, recommend

GB = 1e9
_MEMORY = ("param", "optim", "EMA", "grad", "gathered", "reduce", "activ", "total")


def memory_cells(each: Estimate, decimals: int = 1) -> list[str]:
    """GB of each part of the memory and of their sum."""
    memory = each.memory
    return [f"{value / GB:.{decimals}f}" for value in (*memory.parts().values(), memory.total)]


def time_cells(each: Estimate, decimals: int = 1, of_seconds: int = 2) -> list[str]:
    """GB over both links, and seconds."""
    sent = (each.traffic.nvlink / GB, each.traffic.network / GB)
    seconds = (each.compute, each.hidden, each.exposed, each.with_overlap, each.without_overlap)
    cells = [f"{value:.{decimals}f}" for value in sent]
    return cells + [f"{value:.{of_seconds}f}" for value in seconds]


def _decimals(values: Iterable[float], least: int) -> int:
    """As many that the largest value has three digits, but at least ``least``."""
    largest = max(values)
    return max(least, 2 - math.floor(math.log10(largest))) if largest > 0 else least


def as_text(
    run: Run, cluster: Cluster, estimates: Sequence[Estimate], name: str, limit: int | None
) -> str:
    """The whole report.

    Args:
        run, cluster: what was asked.
        estimates: of every mesh.
        name: of the model.
        limit: how many meshes to list; ``None`` = all.
    """
    best = recommend(estimates)
    listed = sorted(estimates, key=lambda each: (not each.fits, _order(each)))[:limit]
    parts = [
        _header(run, cluster, name),
        _memory_table(listed, best),
        _time_table(listed, best),
    ]
    if len(listed) < len(estimates):
        parts.append(f"{len(estimates) - len(listed)} more plans: --all")
    parts.append(_advice(run, cluster, estimates, best, name))
    if best is not None and best.traffic.flows:
        parts.append(_flows(best, cluster))
    parts.append(_assumptions(run, cluster))
    return "\n\n".join(parts)


def as_json(run: Run, cluster: Cluster, estimates: Sequence[Estimate], name: str) -> str:
    """The same numbers; bytes and seconds."""
    best = recommend(estimates)
    settings = {f: getattr(cluster, f) for f in cluster.__dataclass_fields__}
    settings |= {f: getattr(run, f) for f in run.__dataclass_fields__ if f != "model"}
    result = {
        "model": name,
        "settings": settings,
        "model_config": run.model.to_dict(),
        "recommended": None if best is None else _as_dict(best, cluster),
        "meshes": [_as_dict(each, cluster) for each in estimates],
    }
    return json.dumps(result, indent=1)


def _as_dict(each: Estimate, cluster: Cluster) -> dict[str, Any]:
    memory = each.memory
    return {
        "expert": each.mesh.expert,
        "replicate": each.mesh.replicate,
        "expert_shards": each.mesh.expert_shards,
        "dense_shards": each.mesh.dense_shards,
        "recompute": each.recompute,
        "fits": each.fits,
        "memory_bytes": memory.parts() | {"total": memory.total},
        "fullest_moment": memory.moment,
        "exchanges": [
            {
                "name": flow.name,
                "nvlink_bytes": flow.nvlink,
                "network_bytes": flow.network,
                "seconds": flow_seconds(flow, cluster),
            }
            for flow in each.traffic.flows
        ],
        "seconds": {
            "compute": each.compute,
            "hidden_exchanges": each.hidden,
            "exposed_exchanges": each.exposed,
            "step_with_overlap": each.with_overlap,
            "step_without_overlap": each.without_overlap,
        },
    }


def _order(each: Estimate) -> float:
    return each.with_overlap if each.fits else each.memory.total


def _header(run: Run, cluster: Cluster, name: str) -> str:
    images = cluster.gpus * run.images_per_gpu * run.accumulate
    return (
        f"{name} on {cluster.gpus} GPU{'s' * (cluster.gpus > 1)} of {cluster.gpu_memory:g} GB "
        f"({cluster.usable_bytes / GB:.1f} GB usable)\n"
        f"{images} images a step: {run.images_per_gpu} a GPU and micro-batch, "
        f"{run.accumulate} micro-batch{'es' * (run.accumulate > 1)}; {run.precision}, "
        f"{run.optimizer}, {'with' if run.ema else 'without'} EMA"
    )


def _names(each: Estimate, best: Estimate | None) -> list[str]:
    mark = "*" if each is best else ("" if each.fits else "x")
    return [f"{mark:1s} {each.mesh}", "yes" if each.recompute else "no"]


def _memory_table(listed: Sequence[Estimate], best: Estimate | None) -> str:
    decimals = _decimals((each.memory.total / GB for each in listed), 1)
    rows = [[*_names(each, best), *memory_cells(each, decimals)] for each in listed]
    return "GB of a GPU at its fullest moment (* recommended, x does not fit)\n" + _table(
        ["mesh", "recompute", *_MEMORY], rows
    )


def _time_table(listed: Sequence[Estimate], best: Estimate | None) -> str:
    sent = (max(each.traffic.nvlink, each.traffic.network) / GB for each in listed)
    decimals = _decimals(sent, 1), _decimals((each.without_overlap for each in listed), 2)
    rows = [[*_names(each, best), *time_cells(each, *decimals)] for each in listed]
    seconds = [f"{word} s" for word in ("compute", "hidden", "exposed", "step", "serial")]
    return (
        "What a GPU sends in a step, and seconds (hidden: can overlap with compute; step: it does;"
        " serial: nothing does)\n"
        + _table(["mesh", "recompute", "NVLink GB", "network GB", *seconds], rows)
    )


def _table(headings: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    lines = []
    for row in [headings, *rows]:
        first = row[0].ljust(widths[0])
        others = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([first, *others]))
    return "\n".join(lines)


def _flows(best: Estimate, cluster: Cluster) -> str:
    flows = best.traffic.flows
    sent = _decimals((max(flow.nvlink, flow.network) / GB for flow in flows), 3)
    seconds = _decimals((flow_seconds(flow, cluster) for flow in flows), 3)
    rows = [
        [
            flow.name,
            f"{flow.nvlink / GB:.{sent}f}",
            f"{flow.network / GB:.{sent}f}",
            f"{flow_seconds(flow, cluster):.{seconds}f}",
        ]
        for flow in flows
    ]
    return "The recommended mesh's exchanges of a step\n" + _table(
        ["what", "NVLink GB", "network GB", "s"], rows
    )


def _advice(
    run: Run, cluster: Cluster, estimates: Sequence[Estimate], best: Estimate | None, name: str
) -> str:
    if best is None:
        least = min(estimates, key=lambda each: each.memory.total)
        over = (least.memory.total - cluster.usable_bytes) / GB
        return (
            f"Nothing fits. The smallest, {least.mesh}"
            f"{' with recompute' * least.recompute}, is {over:.1f} GB over at {least.memory.moment}"
            f". Use more GPUs, or fewer images a GPU (--images-per-gpu {run.images_per_gpu})."
        )
    fitting = sum(each.fits for each in estimates)
    reasons = [
        f"{fitting} of {len(estimates)} plans fit; of those within 5 % of the shortest step, then "
        "of the shortest serial step, then of the fewest bytes, it needs the least memory"
    ]
    if best.recompute and not any(each.fits and not each.recompute for each in estimates):
        reasons.append("without recompute nothing fits")
    if best.hidden > best.compute:
        reasons.append(
            "exchanges take longer than the products: more images a GPU would cost little"
        )
    lines = [f"Recommended: {best.mesh}{', with recompute' * best.recompute}"]
    lines += [f"  because {'; '.join(reasons)}.", f"  fullest at {best.memory.moment}"]
    lines.append(f"  python -m dit_models.train: {options_of(best, run, name)}")
    if run.model.num_experts:
        limit = break_even_images(run)
        lines.append(
            f"  Sending rows to experts takes fewer bytes than gathering experts below "
            f"{limit:.0f} images a GPU and micro-batch."
        )
    return "\n".join(lines)


def options_of(best: Estimate, run: Run, name: str) -> str:
    """The options of the training command; those of the model are what its preset has not."""
    mesh, preset = best.mesh, get_config(name).to_dict()
    options = {"model": name} | {
        f"model_options.{field}": json.dumps(value)
        for field, value in run.model.to_dict().items()
        if value != preset[field]
    }
    options |= {
        "parallel.data": str(mesh.gpus),
        "parallel.expert": str(mesh.expert),
        "parallel.replicate": str(mesh.replicate),
        "parallel.reshard_after_forward": json.dumps(run.reshard_after_forward),
        "gradient_checkpointing": json.dumps(best.recompute),
        "batch_size": str(mesh.gpus * run.images_per_gpu * run.accumulate),
        "accumulate": str(run.accumulate),
        "precision": run.precision,
        "optimizer.kind": run.optimizer,
    }
    return " ".join(f"{field}={value}" for field, value in options.items())


def _assumptions(run: Run, cluster: Cluster) -> str:
    return (
        "Assumed, not measured: "
        f"{cluster.nvlink_gb_s:g} GB/s a GPU and direction inside a node of "
        f"{cluster.gpus_per_node}, {cluster.network_gb_s:g} GB/s between nodes, "
        f"{cluster.tflops:g} TFLOPS of which {cluster.utilization:.0%} are reached, "
        f"{cluster.reserve:.0%} of the memory left for CUDA, NCCL and fragmentation. Blocks run "
        "in eager mode; latencies, data loading and the optimizer's time are not counted. "
        "docs/scaling.md has the formulae."
    )
