"""Results as rows of text, shared by the printed table and the report."""

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
    "error",
    "ops",
    "reads",
    "remark",
)
WIDTHS = (34, 9, 23, 10, 11, 12, 8, 4, 5, 0)
LEGEND = (
    "*ops*: operators that one call dispatches. *reads*: how many of them would make a GPU's host "
    "wait. Counted in one mode."
)


def group_of(result: dict[str, Any]) -> str:
    """What stands together in a report: the first word of the name."""
    return str(result["name"].split("/")[0])


def rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row for each mode and provider; what was not timed says why."""
    name, providers = result["name"], result["providers"]
    for provider, verdict in providers.items():
        if verdict["status"] in ("wrong", "skipped"):
            word = "FAIL" if provider == "ours" else verdict["status"]
            yield (name, "all", provider, word, *("",) * 5, verdict["reason"])
    for mode, found in result["modes"].items():
        for provider, time in found["times"].items():
            ratio = found["ratios"].get(provider)
            yield (
                name,
                mode,
                provider,
                duration(time["median"]),
                f"{ratio['median']:.2f}x" if ratio else "",
                f"{ratio['low']:.2f}-{ratio['high']:.2f}" if ratio else "",
                _error(providers[provider]),
                *_counted(result, mode, provider),
                _remark(result, mode, provider),
            )
    ours = result["memory"].get("ours", {}).get("peak_bytes")
    for provider, found in result["memory"].items():
        peak = found.get("peak_bytes")
        yield (
            name,
            "memory",
            provider,
            f"{peak / 2**20:.1f} MiB" if peak else "-",
            f"{peak / ours:.2f}x" if peak and ours and provider != "ours" else "",
            *("",) * 4,
            found.get("reason") or _memory_remark(result, provider),
        )


def _memory_remark(result: dict[str, Any], provider: str) -> str:
    """What the peak is made of, and the goal."""
    found = result["memory"][provider]
    parts = [f"{found['saved_bytes'] / 2**20:.1f} MiB kept for backward"]
    parts.append(f"{found['gradient_bytes'] / 2**20:.1f} MiB gradients")
    remarks = [_remark(result, mode, provider) for mode in ("memory", "saved")]
    return "; ".join([*parts, *filter(None, dict.fromkeys(remarks))])


def _error(verdict: dict[str, Any]) -> str:
    return f"{max(verdict['errors'].values()):.0e}" if verdict["errors"] else ""


def _counted(result: dict[str, Any], mode: str, provider: str) -> tuple[str, str]:
    """Operators and device reads of one call, in the mode in which they were counted."""
    found = result.get("calls", {}).get(provider, {})
    if found.get("mode") != mode:
        return "", ""
    return str(found["ops"]), str(found["device_reads"])


def _remark(result: dict[str, Any], mode: str, provider: str) -> str:
    """Ours: the machine's limit and its share of our time; others: the goal, or "not a peer"."""
    if provider == "ours" and mode in result["modes"]:
        found = result["modes"][mode]
        if not found["limit"]:
            return ""
        share = found["limit"] / found["times"]["ours"]["median"]
        return f"limit {duration(found['limit'])} ({share:.0%})"
    words = ["not a peer"] if result["providers"][provider]["kind"] == "limit" else []
    for goal in result["goals"]:
        if (goal["mode"], goal["against"]) == (mode, provider):
            words.append(f"goal {goal['wanted']}: {'met' if goal['met'] else 'MISSED'}")
    return "; ".join(words)


def line(cells: tuple[str, ...]) -> str:
    """A row in columns of fixed width."""
    padded = (cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True))
    return " ".join(padded).rstrip()


def slower_lines(results: list[dict[str, Any]]) -> list[str]:
    """Where a plain alternative beats ours, the worst first."""
    found = [
        (item["ratio"], result["name"], item["mode"], item["provider"])
        for result in results
        for item in result["slower"]
    ]
    return [
        f"{name}, {mode}: {provider} takes {ratio:.2f} of our time"
        for ratio, name, mode, provider in sorted(found)
    ]
