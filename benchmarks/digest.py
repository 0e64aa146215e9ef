"""What follows from results: the strongest alternative, what is usual, wins, losses, goals.

Pure functions of stored results; nothing is measured here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.check import OURS
from benchmarks.ratios import quantile
from benchmarks.table import group_of

# A ratio nearer to 1 than this counts as level: repeated runs differ by as much.
MARGIN = 0.03
# What is usually written for a stage: the published code of a layer, the usual calls of an op.
USUAL = {
    "dit_moe_layer": "published",
    "ec_layer": "one_hot",
    "token_choice": "eager",
    "expert_choice": "eager",
    "dispatch": "index_select",
    "combine": "index_add",
    "single_op": "eager",
}
NOT_ALTERNATIVES = (*OURS, "limit")


@dataclass(frozen=True)
class Other:
    """A provider beside ours: its median time, and other/ours with quartiles."""

    provider: str
    seconds: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Ours beside the alternatives in one mode of an entry.

    Attributes:
        entry, mode: which.
        seconds: our median time.
        error: our largest relative error.
        others: every alternative that was timed, the fastest first.
        usual: the one that is usually written.
        limit: the machine's limit over our time, where there is one.
    """

    entry: str
    mode: str
    seconds: float
    error: float | None
    others: tuple[Other, ...]
    usual: Other | None
    limit: float | None

    @property
    def group(self) -> str:
        return self.entry.partition("/")[0]

    @property
    def strongest(self) -> Other | None:
        return self.others[0] if self.others else None


def device_of(result: dict[str, Any]) -> str:
    """Where an entry was measured; older results say it by what they hold."""
    return str(result.get("device") or ("cuda" if result.get("probes") else "cpu"))


def alternatives(result: dict[str, Any]) -> list[str]:
    """Providers that compute the same, or a part of it, and are not this library's kernels."""
    return [
        name
        for name, verdict in result["providers"].items()
        if verdict["kind"] not in NOT_ALTERNATIVES
    ]


def comparisons(results: Iterable[dict[str, Any]]) -> Iterator[Comparison]:
    """One for each entry and mode in which ours was timed."""
    for result in results:
        names = alternatives(result)
        for mode, found in result["modes"].items():
            if "ours" not in found["times"]:
                continue
            errors = result["providers"]["ours"]["errors"]
            others = [_other(name, found) for name in names if name in found["ratios"]]
            others.sort(key=lambda other: other.ratio)
            usual = [other for other in others if other.provider == USUAL.get(result["stage"])]
            seconds = found["times"]["ours"]["median"]
            yield Comparison(
                result["name"],
                mode,
                seconds,
                max(errors.values()) if errors else None,
                tuple(others),
                usual[0] if usual else None,
                found["limit"] / seconds if found.get("limit") else None,
            )


def _other(name: str, found: dict[str, Any]) -> Other:
    ratio = found["ratios"][name]
    seconds = found["times"][name]["median"]
    return Other(name, seconds, ratio["median"], ratio["low"], ratio["high"])


def bounds(results: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, float, Other]]:
    """Entry, mode, our time, and what computes another function with the same arithmetic."""
    for result in results:
        names = [name for name, it in result["providers"].items() if it["kind"] == "limit"]
        for mode, found in result["modes"].items():
            for name in names:
                if name in found["ratios"]:
                    seconds = found["times"]["ours"]["median"]
                    yield result["name"], mode, seconds, _other(name, found)


@dataclass(frozen=True)
class Totals:
    """How the comparisons of a group end, against the strongest alternative of each."""

    group: str
    faster: int
    level: int
    slower: int
    strongest: float
    usual: float | None

    @property
    def compared(self) -> int:
        return self.faster + self.level + self.slower


def totals(found: Iterable[Comparison]) -> list[Totals]:
    """Of each group: how many are faster, level and slower, and the median ratios."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in found:
        if comparison.strongest is not None:
            groups.setdefault(comparison.group, []).append(comparison)
    return [_totals(group, members) for group, members in groups.items()]


def _totals(group: str, members: list[Comparison]) -> Totals:
    ratios = [member.strongest.ratio for member in members if member.strongest is not None]
    usual = [member.usual.ratio for member in members if member.usual is not None]
    faster = sum(ratio > 1 + MARGIN for ratio in ratios)
    slower = sum(ratio < 1 - MARGIN for ratio in ratios)
    return Totals(
        group,
        faster,
        len(ratios) - faster - slower,
        slower,
        quantile(ratios, 0.5),
        quantile(usual, 0.5) if usual else None,
    )


def slower(found: Iterable[Comparison]) -> list[tuple[Comparison, Other]]:
    """Every alternative that beats ours by more than the margin, the worst first."""
    pairs = [
        (comparison, other)
        for comparison in found
        for other in comparison.others
        if other.ratio < 1 - MARGIN
    ]
    return sorted(pairs, key=lambda pair: (pair[1].ratio, pair[0].entry, pair[0].mode))


def slower_models(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Whole models that the published code computes faster than ours, the worst first."""
    found = [
        model
        for model in document.get("models", [])
        if model.get("against") == "published" and (model.get("ratio") or 1.0) < 1 - MARGIN
    ]
    return sorted(found, key=lambda model: float(model["ratio"]))


@dataclass(frozen=True)
class Memory:
    """Bytes of one forward and backward, and over ours."""

    entry: str
    provider: str
    is_alternative: bool
    peak: int
    saved: int
    peak_ratio: float | None
    saved_ratio: float | None


def memory(results: Iterable[dict[str, Any]]) -> Iterator[Memory]:
    """What was measured of each entry, ours first."""
    for result in results:
        sizes = {name: found for name, found in result["memory"].items() if "peak_bytes" in found}
        ours = sizes.get("ours")
        names = alternatives(result)
        for name in sorted(sizes, key=lambda name: name != "ours"):
            found = sizes[name]
            yield Memory(
                result["name"],
                name,
                name in names,
                found["peak_bytes"],
                found["saved_bytes"],
                _share(found, ours, "peak_bytes"),
                _share(found, ours, "saved_bytes"),
            )


def _share(found: dict[str, int], ours: dict[str, int] | None, key: str) -> float | None:
    """Over ours; nothing to divide by where ours keeps nothing."""
    return found[key] / ours[key] if ours is not None and ours[key] > 0 else None


def larger(found: Iterable[Memory]) -> list[tuple[Memory, str, float]]:
    """Alternatives that need less memory than ours by more than the margin, the worst first."""
    cases = [
        (item, what, ratio)
        for item in found
        if item.is_alternative
        for what, ratio in (("peak", item.peak_ratio), ("kept for backward", item.saved_ratio))
        if ratio is not None and ratio < 1 - MARGIN
    ]
    return sorted(cases, key=lambda case: (case[2], case[0].entry, case[1]))


@dataclass(frozen=True)
class GoalFound:
    """A wanted ratio or figure and what was measured; ``met`` is ``None`` without a measurement."""

    entry: str
    what: str
    wanted: str
    measured: str
    met: bool | None


def goals(results: Iterable[dict[str, Any]]) -> list[GoalFound]:
    """Every goal, missed ones first."""
    found = []
    for result in results:
        for goal in result["goals"]:
            what = f"{goal['mode']}, {goal['against']}"
            measured = f"{goal['ratio']:.2f}x"
            found.append(GoalFound(result["name"], what, goal["wanted"], measured, goal["met"]))
        for goal in result.get("figure_goals", []):
            value = "-" if goal["value"] is None else f"{goal['value']:.3g}"
            found.append(
                GoalFound(result["name"], goal["figure"], goal["wanted"], value, goal["met"])
            )
    return sorted(found, key=lambda goal: {False: 0, None: 1, True: 2}[goal.met])


def has_axis(result: dict[str, Any]) -> bool:
    """Whether an entry is a point of a series."""
    return bool(result.get("axis"))


def skew_of(result: dict[str, Any]) -> str | None:
    """How unevenly tokens choose experts, where the entry says so."""
    skew = result.get("shape", {}).get("skew")
    return None if skew is None else str(skew)


def by_group(results: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Entries that stand together, in the order of their first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(group_of(result), []).append(result)
    return groups


def warnings(document: dict[str, Any]) -> Iterator[str]:
    """What a reader has to know before believing the figures."""
    environment, settings = document["environment"], document["settings"]
    if str(settings.get("suite", "")).endswith("smoke"):
        yield "A smoke run: every entry has a tiny shape and not the one that its name says."
    if not document["complete"]:
        yield "The run was interrupted or did not measure everything."
    left_out = len(document.get("not_measured", []))
    if left_out:
        steps = "step was" if left_out == 1 else "steps were"
        yield f"{left_out} {steps} left out or cut short, see *Not measured*."
    load, cores = environment.get("load_average"), environment.get("cores")
    if load and cores and load[0] > cores / 2:
        yield f"The machine was busy at the start: load {load[0]:.1f} on {cores} cores."
    if settings.get("busy"):
        yield f"{settings['busy']} busy processes ran beside it, on request."
    if environment.get("dirty"):
        yield "The code had changes that are in no commit."
    modules = environment.get("served_by", {}).values()
    if modules and all("reference" in module for module in modules):
        yield "Every op was served by the plain PyTorch reference: no kernel was measured."
