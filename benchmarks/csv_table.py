"""``results.csv``: every figure of the entries in one flat table, for a spreadsheet or pandas."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from benchmarks.table import group_of

COLUMNS = (
    *("device", "entry", "group", "axis", "value", "shape", "dtype", "provider", "kind", "status"),
    *("mode", "median_seconds", "low_seconds", "high_seconds", "ratio", "ratio_low", "ratio_high"),
    *("error", "peak_bytes", "saved_bytes", "ops", "device_reads"),
    *("kernels", "host_syncs", "reason"),
)


def text(document: dict[str, Any]) -> str:
    """The whole file."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in document["entries"]:
        writer.writerows(rows(result))
    return stream.getvalue()


def rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each mode and provider; mode "memory" has the bytes, "none" what was not timed."""
    for name, verdict in result["providers"].items():
        if verdict["status"] in ("wrong", "skipped"):
            yield {**_common(result, name), "mode": "none", "reason": verdict["reason"]}
    for mode, found in result["modes"].items():
        for name, time in found["times"].items():
            row = {**_common(result, name), "mode": mode}
            row |= {f"{part}_seconds": time[part] for part in ("median", "low", "high")}
            ratio = found["ratios"].get(name)
            if ratio:
                row |= {"ratio": ratio["median"]}
                row |= {"ratio_low": ratio["low"], "ratio_high": ratio["high"]}
            calls = result.get("calls", {}).get(name, {})
            if calls.get("mode") == mode:
                row |= {"ops": calls["ops"], "device_reads": calls["device_reads"]}
            probe = result.get("probes", {}).get(name, {})
            if probe.get("mode") == mode:  # on a GPU
                row |= {key: probe[key] for key in ("kernels", "host_syncs") if key in probe}
            yield row
    for name, memory in result["memory"].items():
        known = ("peak_bytes", "saved_bytes", "reason")
        sizes = {key: memory[key] for key in known if key in memory}
        yield {**_common(result, name), "mode": "memory", **sizes}


def _common(result: dict[str, Any], provider: str) -> dict[str, Any]:
    verdict, axis = result["providers"][provider], result.get("axis") or {}
    errors = verdict["errors"].values()
    return {
        "device": result.get("device", ""),
        "entry": result["name"],
        "group": group_of(result),
        "axis": axis.get("name", ""),
        "value": axis.get("value", ""),
        "shape": " ".join(f"{name}={value}" for name, value in result["shape"].items()),
        "dtype": result["dtype"],
        "provider": provider,
        "kind": verdict["kind"],
        "status": verdict["status"],
        "error": max(errors) if errors else "",
    }
