"""Figures of one entry on a GPU by name, and which wanted ones are met.

==========================  =====================================================================
``<mode>.us``               device time of a call of ours, microseconds
``<mode>.host_us``          how long a call of ours keeps the host, microseconds
``<mode>.graph_us``         device time of a call inside a CUDA graph, microseconds
``<mode>.graph_ratio.<p>``  the same of provider p over ours
``<mode>.tflops``           arithmetic of the activated products over our time
``<mode>.copy_share``       time of a copy that moves as many bytes over ours
``<mode>.best``             time of the fastest plain alternative over ours
``<mode>.cuda_speedup``     time of ours by the Triton backend over that by the CUDA backend
``<mode>.dense_share``      our time over that of a dense MLP of the same activated FLOPs
``saved_share.<p>``         bytes that ours keeps for the backward over those of provider p
``host_syncs``              how often one of our calls makes the host wait
``kernels``                 kernels of one of our calls
==========================  =====================================================================
"""

from typing import Any

from benchmarks.entry import BY_BACKEND, Entry, Stage
from benchmarks.gpu.limits import Limits


def figures_of(
    entry: Entry, stage: Stage, result: dict[str, Any], limits: Limits
) -> dict[str, float]:
    """Every figure that the result of an entry gives."""
    figures: dict[str, float] = {}
    for mode, found in result["modes"].items():
        ours = found["times"]["ours"]["median"]
        cost = stage.cost(entry.shape, entry.torch_dtype.itemsize, mode)
        figures[f"{mode}.us"] = ours * 1e6
        figures[f"{mode}.host_us"] = found["host"]["ours"]["median"] * 1e6
        if cost.flops:
            figures[f"{mode}.tflops"] = cost.flops / ours * 1e-12
        if cost.bytes:
            figures[f"{mode}.copy_share"] = limits.traffic_seconds(cost) / ours
        plain = [
            ratio["median"]
            for name, ratio in found["ratios"].items()
            if result["providers"][name]["kind"] == "plain"
        ]
        if plain:
            figures[f"{mode}.best"] = min(plain)
        if found["times"].keys() >= set(BY_BACKEND):
            cuda, triton = (found["times"][name]["median"] for name in BY_BACKEND)
            figures[f"{mode}.cuda_speedup"] = triton / cuda
        if "dense_limit" in found["ratios"]:
            figures[f"{mode}.dense_share"] = 1 / found["ratios"]["dense_limit"]["median"]
        figures |= _in_graphs(mode, found["graph"])
    figures |= _kept(result["memory"])
    probes = result["probes"].get("ours", {})
    figures |= {
        name: probes[name] for name in ("host_syncs", "kernels") if probes.get(name) is not None
    }
    return figures


def _in_graphs(mode: str, found: dict[str, Any]) -> dict[str, float]:
    medians = {name: time["median"] for name, time in found.items() if "median" in time}
    if "ours" not in medians:
        return {}
    ours = medians.pop("ours")
    ratios = {f"{mode}.graph_ratio.{name}": time / ours for name, time in medians.items()}
    return {f"{mode}.graph_us": ours * 1e6} | ratios


def _kept(memory: dict[str, Any]) -> dict[str, float]:
    saved = {name: found["saved_bytes"] for name, found in memory.items() if "saved_bytes" in found}
    ours = saved.pop("ours", None)
    if ours is None:
        return {}
    return {f"saved_share.{name}": ours / other for name, other in saved.items() if other}


def weigh_figures(entry: Entry, figures: dict[str, float]) -> list[dict[str, Any]]:
    """Every wanted figure with its value and whether it is met; ``None`` when not measured."""
    weighed = []
    for goal in entry.figures:
        value = figures.get(goal.figure)
        weighed.append(
            {
                "figure": goal.figure,
                "wanted": goal.words(),
                "value": value,
                "met": None if value is None else goal.met(value),
            }
        )
    return weighed
