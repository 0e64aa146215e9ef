"""What a call does besides computing: operators, device reads, first calls."""

from collections.abc import Iterator
from typing import Any

from benchmarks.sections.view import View, folded
from benchmarks.words import duration, listed, table


def counts(view: View) -> Iterator[str]:
    """Operators (CPU) or kernels (GPU) of one call, and reads that a GPU's host waits for."""
    rows = list(filter(None, (_counted(result) for result in view.results)))
    if not rows:
        return
    if view.device == "cuda":
        yield "Kernels that one call launches / times that it makes the host wait for the GPU."
    else:
        yield (
            "Operators that one call dispatches / reads of device memory among them, each of which "
            "makes the host wait on a GPU. Counted on the CPU, not timed. A fused operator counts "
            "once, whatever it does inside; on a GPU it may launch several kernels."
        )
    yield ""
    yield from folded(
        "All entries", list(table(("entry", "mode", "ours", "others"), map(_cells, rows)))
    )


_Row = tuple[str, str, dict[str, str]]


def _cells(row: _Row) -> tuple[str, ...]:
    entry, mode, found = row
    others = listed(f"{name} {words}" for name, words in found.items() if name != "ours")
    return entry, mode, found["ours"], others


def _counted(result: dict[str, Any]) -> _Row | None:
    """Entry, mode and words of each provider, where ours was counted."""
    counted = {
        name: (found["mode"], f"{found['ops']} / {found['device_reads']}")
        for name, found in result.get("calls", {}).items()
        if "ops" in found
    }
    counted |= {
        name: (found["mode"], f"{found['kernels']} / {found['host_syncs']}")
        for name, found in result.get("probes", {}).items()
        if "kernels" in found
    }
    if "ours" not in counted:
        return None
    mode = counted["ours"][0]
    same = {name: words for name, (of, words) in counted.items() if of == mode}
    return result["name"], mode, same


def first_calls(document: dict[str, Any]) -> Iterator[str]:
    """Import, first and later calls in fresh processes; the GPU's with empty caches."""
    rows = [_first_row(found) for found in document.get("compile", [])]
    if rows:
        yield (
            "A forward and backward, each layer in a fresh process with empty caches. *build*: "
            "importing and making it. *new sizes*: the first calls with two other numbers of "
            "tokens. *breaks*, *recompiles*: of torch.compile with its default settings, the "
            "latter after the first call."
        )
        yield ""
        columns = ("layer", "provider", "build", "first call", "later", "new sizes")
        yield from table((*columns, "breaks", "recompiles", ""), rows)
        yield ""
    for name, found in document.get("first_call", {}).items():
        words = listed(f"{key} {value:.1f}" for key, value in found.items())
        yield f"- {name} on the GPU, with empty caches: {words}"
    if document.get("first_call"):
        yield ""


def _first_row(found: dict[str, Any]) -> tuple[str, ...]:
    build = [found[key] for key in ("import_seconds", "build_seconds") if key in found]
    times = [sum(build) if build else None]
    times += [found.get(f"{key}_seconds") for key in ("first", "steady")]
    counted = [found.get(key) for key in ("graph_breaks", "recompiles")]
    return (
        found["name"],
        found["provider"],
        *("" if seconds is None else duration(seconds) for seconds in times),
        listed(map(duration, found.get("new_size_seconds", []))),
        *("" if count is None else str(count) for count in counted),
        found.get("reason") or "",
    )
