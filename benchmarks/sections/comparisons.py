"""Ours beside the alternatives: what wins, where it is slower, goals."""

from collections.abc import Iterator
from typing import Any

from benchmarks import digest
from benchmarks.sections.view import View, folded
from benchmarks.words import duration, ratio, spread, table

_EVEN = f"{digest.MARGIN:.0%}".replace("%", " %")


def wins(view: View) -> Iterator[str]:
    """A line for each group; every comparison, layers first, with its picture."""
    totals = digest.totals(view.comparisons)
    if not totals:
        return
    compared, faster = sum(t.compared for t in totals), sum(t.faster for t in totals)
    level, slower = sum(t.level for t in totals), sum(t.slower for t in totals)
    yield (
        f"Against the strongest alternative of each of {compared} comparisons ours is faster in "
        f"{faster}, level (within {_EVEN}) in {level} and slower in {slower}."
    )
    yield ""
    columns = ("group", "compared", "faster", "level", "slower")
    yield from table((*columns, "median, strongest", "median, usual code"), map(_row, totals))
    yield ""
    groups = digest.by_group(view.results)
    for group, members in sorted(groups.items(), key=lambda item: not _is_layer(item[1][0])):
        yield from view.drawn(group) if _is_plain(members[0]) else ()
        lines = list(_all_of(view, group))
        if _is_layer(members[0]):
            yield from (f"**{group}**", "", *lines, "")
        else:
            yield from folded(f"{group}: all comparisons", lines)


def _is_plain(result: dict[str, Any]) -> bool:
    """Series and uneven loads have sections of their own."""
    return not digest.has_axis(result) and digest.skew_of(result) is None


def _is_layer(result: dict[str, Any]) -> bool:
    """What a reader looks for first is not folded."""
    return _is_plain(result) and bool(result["modes"]) and result["stage"].endswith("_layer")


def _row(of: digest.Totals) -> tuple[str, ...]:
    numbers = [str(number) for number in (of.compared, of.faster, of.level, of.slower)]
    usual = "" if of.usual is None else ratio(of.usual)
    return of.group, *numbers, ratio(of.strongest), usual


def _all_of(view: View, group: str) -> Iterator[str]:
    rows = [
        (
            comparison.entry.partition("/")[2],
            comparison.mode,
            duration(comparison.seconds),
            _beside(comparison.strongest),
            _beside(comparison.usual),
            "" if comparison.error is None else f"{comparison.error:.0e}",
        )
        for comparison in view.comparisons
        if comparison.group == group
    ]
    yield from table(("entry", "mode", "ours", "strongest", "usual code", "error"), rows)


def _beside(other: digest.Other | None) -> str:
    if other is None:
        return ""
    return f"{other.provider} {_ratio(other)}"


def _ratio(other: digest.Other) -> str:
    return f"{ratio(other.ratio)} ({spread(other.low, other.high)})"


def slower(view: View) -> Iterator[str]:
    """Every alternative that is faster, or needs less memory, by more than the margin."""
    if not view.comparisons:
        return
    models = digest.slower_models(view.document) if view.device == "cpu" else []
    rows = [*map(_model_row, models), *map(_slower_row, digest.slower(view.comparisons))]
    if rows:
        yield f"Alternatives that take more than {_EVEN} less time than ours, the worst first:"
        yield ""
        yield from table(("entry", "mode", "ours", "faster", "its time", "other/ours"), rows)
    else:
        yield f"No alternative takes more than {_EVEN} less time than ours in this run."
    yield ""
    larger = digest.larger(digest.memory(view.results))
    if larger:
        yield f"Alternatives that need more than {_EVEN} less memory than ours:"
        yield ""
        needs = [(item.entry, what, item.provider, ratio(of)) for item, what, of in larger]
        yield from table(("entry", "memory", "alternative", "other/ours"), needs)
        yield ""


def _slower_row(pair: tuple[digest.Comparison, digest.Other]) -> tuple[str, ...]:
    found, other = pair
    times = duration(found.seconds), other.provider, duration(other.seconds)
    return found.entry, found.mode, *times, _ratio(other)


def _model_row(model: dict[str, Any]) -> tuple[str, ...]:
    times, against = model["seconds"], model["against"]
    quartiles = f" ({spread(*model['quartiles'])})" if model.get("quartiles") else ""
    return (
        f"{model['name']}, {model['batch_size']} images",
        "whole model",
        duration(times["ours"]),
        against,
        duration(times[against]),
        f"{ratio(model['ratio'])}{quartiles}",
    )


def goals(view: View) -> Iterator[str]:
    """Wanted ratios and figures; the missed ones first."""
    found = digest.goals(view.results)
    if not found:
        return
    met = sum(goal.met is True for goal in found)
    missed = sum(goal.met is False for goal in found)
    yield f"{met} of {len(found)} met, {missed} missed. They are meant for an idle machine."
    yield ""
    words = {True: "met", False: "**missed**", None: "not measured"}
    rows = [(goal.entry, goal.what, goal.wanted, goal.measured, words[goal.met]) for goal in found]
    columns = ("entry", "goal", "wanted", "measured", "")
    missing = [row for row, goal in zip(rows, found, strict=True) if goal.met is not True]
    yield from folded("Missed or not measured", list(table(columns, missing)))
    yield from folded("Met", list(table(columns, [row for row in rows if row not in missing])))
