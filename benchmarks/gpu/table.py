"""Results of a GPU as rows of text, shared by the printed table and the report."""

from collections.abc import Iterator
from typing import Any

from benchmarks.words import duration

COLUMNS = (
    "entry",
    "mode",
    "provider",
    "time",
    "other/ours",
    "quartiles",
    "in a graph",
    "host",
    "TFLOPS",
    "error",
    "remark",
)
WIDTHS = (38, 9, 16, 10, 11, 12, 11, 10, 7, 8, 0)
LEGEND = (
    "*time*: between two events, cold cache, the host ahead. *in a graph*: one of 20 calls in a "
    "CUDA graph, for calls below 0.3 ms, warm cache. *host*: how long the call keeps the host. "
    "*TFLOPS*: of the activated products."
)


def is_gpu(result: dict[str, Any]) -> bool:
    """Whether the result comes from ``benchmarks.gpu.runner``."""
    return "figures" in result


def rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row for each mode and provider, then memory; what was not timed says why."""
    name, providers = result["name"], result["providers"]
    blank = ("",) * 6
    for provider, verdict in providers.items():
        if verdict["status"] in ("wrong", "skipped"):
            word = "FAIL" if provider == "ours" else verdict["status"]
            yield (name, "all", provider, word, *blank, verdict["reason"])
    for mode, found in result["modes"].items():
        for provider, time in found["times"].items():
            ratio = found["ratios"].get(provider)
            in_graph = found["graph"].get(provider, {})
            errors = providers[provider]["errors"]
            yield (
                name,
                mode,
                provider,
                duration(time["median"]),
                f"{ratio['median']:.2f}x" if ratio else "",
                f"{ratio['low']:.2f}-{ratio['high']:.2f}" if ratio else "",
                duration(in_graph["median"]) if "median" in in_graph else "",
                duration(found["host"][provider]["median"]),
                _tflops(result, mode, time["median"]),
                f"{max(errors.values()):.0e}" if errors else "",
                _remark(result, mode, provider),
            )
    ours = result["memory"].get("ours", {}).get("peak_bytes")
    for provider, found in result["memory"].items():
        peak, saved = found["peak_bytes"], found["saved_bytes"]
        ratio = f"{peak / ours:.2f}x" if ours and provider != "ours" else ""
        remark = f"{saved / 2**20:.1f} MiB kept for backward; "
        remark += f"{found['gradient_bytes'] / 2**20:.1f} MiB gradients"
        peak_cell = f"{peak / 2**20:.1f} MiB"
        yield (name, "memory", provider, peak_cell, ratio, *("",) * 5, remark)


def _tflops(result: dict[str, Any], mode: str, seconds: float) -> str:
    """From ours: the arithmetic is the same for all, the time is not."""
    ours = result["figures"].get(f"{mode}.tflops")
    if ours is None or ours < 1:  # routing and rows are no arithmetic to speak of
        return ""
    return f"{ours * result['modes'][mode]['times']['ours']['median'] / seconds:.0f}"


def _remark(result: dict[str, Any], mode: str, provider: str) -> str:
    found = result["modes"][mode]
    words = ["not a peer"] if result["providers"][provider]["kind"] == "limit" else []
    if provider == "ours" and found["limit"]:
        share = found["limit"] / found["times"]["ours"]["median"]
        words.append(f"limit {duration(found['limit'])} ({share:.0%})")
    for goal in result["goals"]:
        if (goal["mode"], goal["against"]) == (mode, provider):
            words.append(f"goal {goal['wanted']}: {'met' if goal['met'] else 'MISSED'}")
    probe = result["probes"].get(provider, {})
    if probe.get("mode") == mode:
        words.append(f"{probe['host_syncs']} host syncs")
        if "kernels" in probe:
            words.append(f"{probe['kernels']} kernels, {probe['copies']} copies")
    if "reason" in found["graph"].get(provider, {}):
        words.append(f"no graph: {found['graph'][provider]['reason']}")
    return "; ".join(words)


def line(cells: tuple[str, ...]) -> str:
    """A row in columns of fixed width."""
    padded = (cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True))
    return " ".join(padded).rstrip()
