"""Two result documents side by side: ours before and after, the peers' drift, the ratios.

The peers did not change, so what happened to them is what the machine contributed.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.ratios import quantile
from benchmarks.table import duration

# What makes times of two runs incomparable, or explains their difference.
MACHINE = ("cpu", "cores", "threads", "os", "python", "torch", "blas", "moe_kernels", "commit")
WIDTHS = (38, 9, 10, 10, 7, 7, 14, 9, 9)
HEAD = ("entry", "mode", "before", "after", "ours", "peers", "ratio against", "before", "after")


def text(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Everything that differs, a line each."""
    lines = list(_machines(before, after))
    old, new = _by_name(before), _by_name(after)
    other = [name for name in new if name in old and _shape(old[name]) != _shape(new[name])]
    rows = list(_rows(old, {name: new[name] for name in new if name not in other}))
    rows += _models(before, after)
    if rows:
        lines += [_line(HEAD), *map(_line, rows)]
        lines.append(
            "after/before: below 1 is faster; 'peers' is the median over the other providers. "
            "A ratio is other/ours, against the alternative that was fastest before."
        )
    else:
        lines.append("The two runs have no entry and mode, and no model, in common.")
    if other:  # as of a smoke run
        lines.append(f"not compared, of another shape or dtype: {', '.join(other)}")
    lines += _only("before", before, after)
    lines += _only("after", after, before)
    return "\n".join(lines)


def _by_name(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {result["name"]: result for result in document["entries"]}


def _shape(result: dict[str, Any]) -> tuple[Any, Any]:
    return result.get("shape"), result.get("dtype")


def _machines(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    first, second = _machine(before), _machine(after)
    for key in dict.fromkeys([*first, *second]):
        if first.get(key) != second.get(key):
            yield f"other {key}: {first.get(key)} before, {second.get(key)} after"


def _machine(document: dict[str, Any]) -> dict[str, Any]:
    environment = document.get("environment", {})
    found = {key: environment[key] for key in MACHINE if key in environment}
    if "gpu" in environment.get("device", {}):
        found["gpu"] = environment["device"]["gpu"]
    return found


def _rows(
    old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, ...]]:
    for name, result in new.items():
        for mode, found in result["modes"].items():
            known = old.get(name, {"modes": {}})["modes"].get(mode)
            if known is not None:
                plain = {n for n, item in result["providers"].items() if item["kind"] == "plain"}
                yield (name, mode, *_cells(known, found, plain))


def _models(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Whole models, whose one other provider is published code or a dense twin."""
    old, new = (
        {(model["name"], model["batch_size"]): model for model in document.get("models", [])}
        for document in (before, after)
    )
    for (name, batch_size), found in new.items():
        known, other = old.get((name, batch_size)), found["against"]
        if known is not None and known["against"] == other:
            first, second = known["seconds"], found["seconds"]
            yield (
                f"{name.partition(':')[0]}, images: {batch_size}",
                "model",
                duration(first["ours"]),
                duration(second["ours"]),
                f"{second['ours'] / first['ours']:.2f}x",
                f"{second[other] / first[other]:.2f}x",
                other,
                f"{known['ratio']:.2f}x",
                f"{found['ratio']:.2f}x",
            )


def _cells(known: dict[str, Any], found: dict[str, Any], plain: set[str]) -> tuple[str, ...]:
    first = {provider: time["median"] for provider, time in known["times"].items()}
    second = {provider: time["median"] for provider, time in found["times"].items()}
    drift = [second[n] / first[n] for n in first if n in second and n != "ours"]
    both = plain & known["ratios"].keys() & found["ratios"].keys()
    common = {n: known["ratios"][n]["median"] for n in sorted(both)}
    against = min(common, key=lambda n: common[n]) if common else ""
    return (
        duration(first["ours"]),
        duration(second["ours"]),
        f"{second['ours'] / first['ours']:.2f}x",
        f"{quantile(drift, 0.5):.2f}x" if drift else "-",
        against,
        f"{common[against]:.2f}x" if against else "",
        f"{found['ratios'][against]['median']:.2f}x" if against else "",
    )


def _only(when: str, one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    names = [name for name in _by_name(one) if name not in _by_name(other)]
    if names:
        yield f"only {when}: {', '.join(names)}"


def _line(cells: tuple[str, ...]) -> str:
    return " ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()
