"""The parts of a page about one document, in their order; each is absent without figures."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.sections import background, calls, comparisons, costs, machine, whole
from benchmarks.sections.view import DEVICES, View, devices

__all__ = ["PER_DEVICE", "PER_DOCUMENT", "View", "about", "missing"]

# Made from the entries of one device.
PER_DEVICE: tuple[tuple[str, Callable[[View], Iterator[str]]], ...] = (
    ("What wins", comparisons.wins),
    ("Where it is slower", comparisons.slower),
    ("Goals", comparisons.goals),
    ("Cost against tokens, experts, capacity and width", costs.series),
    ("Uneven loads", costs.skew),
    ("Beside a dense MLP", costs.dense),
    ("Memory", costs.memory),
    ("Distance from the machine's limit", costs.limit),
    ("Operators and device reads of a call", calls.counts),
)
# Made from what a document holds besides entries.
PER_DOCUMENT: tuple[tuple[str, Callable[[dict[str, Any]], Iterator[str]], str], ...] = (
    ("First calls", calls.first_calls, "compile"),
    ("Whole models", whole.models, "models"),
    ("Share of time by stage", whole.stages, "stages"),
)
LAST: tuple[tuple[str, Callable[[dict[str, Any]], Iterator[str]]], ...] = (
    ("Tests before measuring", background.checks),
    ("Providers", background.providers),
    ("Not measured", background.not_measured),
    ("How to reproduce", background.reproduce),
)


def about(document: dict[str, Any], pictures: Mapping[str, str], heading: str) -> Iterator[str]:
    """Everything about a document.

    Args:
        document: to describe.
        pictures: links to its pictures by their names.
        heading: how a section's title begins, ``"##"`` or ``"###"``.
    """
    yield from machine.machine(document)
    views = [View(document, device, pictures) for device in devices(document)]
    for view in views:
        suffix = f", {DEVICES[view.device]}" if len(views) > 1 else ""
        for title, make in PER_DEVICE:
            yield from _section(f"{heading} {title}{suffix}", make(view))
    for title, make_document, kind in PER_DOCUMENT:
        drawn = [line for view in views for line in view.drawn(kind)]
        yield from _section(f"{heading} {title}", iter([*make_document(document), *drawn]))
    for title, make_document in LAST:
        yield from _section(f"{heading} {title}", make_document(document))
    absent = missing(document)
    if absent:
        yield f"Not part of this result: {', '.join(absent)}."
        yield ""


def _section(title: str, lines: Iterator[str]) -> Iterator[str]:
    found = list(lines)
    if found:
        yield from (title, "", *found)


def missing(document: dict[str, Any]) -> list[str]:
    """Titles of the sections that a document has no figures for."""
    views = [View(document, device) for device in devices(document)]
    absent = [title for title, make in PER_DEVICE if not any(any(make(view)) for view in views)]
    absent += [title for title, make, _ in PER_DOCUMENT if not any(make(document))]
    return [title[0].lower() + title[1:] for title in absent]
