"""Series of results in which one size grows, and the exponents that are fitted to them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.table import group_of

MIN_POINTS = 3


def exponents(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The exponent p of ``time ~ size ** p`` for each series, mode and provider.

    A least-squares line through the logarithms of median times. A provider with fewer than
    ``MIN_POINTS`` sizes in a series, because it was skipped or time ran out, is left out.

    Args:
        results: entries of a document; those without ``axis`` are passed over.

    Returns:
        ``{"series", "axis", "mode", "provider", "exponent", "points"}`` in the order in which the
        results name them; ``points`` is the number of sizes.
    """
    times: dict[tuple[str, str, str, str], dict[float, float]] = {}
    for result in results:
        axis = result.get("axis")
        if not axis:
            continue
        for mode, found in result["modes"].items():
            for provider, summary in found["times"].items():
                key = (group_of(dict(result)), axis["name"], mode, provider)
                times.setdefault(key, {})[axis["value"]] = summary["median"]
    return [
        {
            "series": series,
            "axis": axis_name,
            "mode": mode,
            "provider": provider,
            "exponent": slope(list(points), list(points.values())),
            "points": len(points),
        }
        for (series, axis_name, mode, provider), points in times.items()
        if len(points) >= MIN_POINTS
    ]


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Least-squares slope of log seconds over log sizes; at least two different sizes."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
