"""The short table at the end of ``gpu-check``: ours, the best alternative, goals."""

from collections.abc import Iterator
from typing import Any

from benchmarks.words import duration

WIDTHS = (38, 9, 10, 10, 24, 8, 0)
COLUMNS = ("entry", "mode", "ours", "in graph", "best alternative", "TFLOPS", "goals")


def lines(results: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each mode that has a goal, and for the last one: a training step where timed."""
    yield _line(COLUMNS)
    for result in results:
        ours = result["providers"]["ours"]
        if ours["status"] == "wrong":
            yield _line((result["name"], "", "FAIL", "", "", "", ours["reason"]))
            continue
        goals = list(_goals(result))
        last = list(result["modes"])[-1]
        for mode in result["modes"]:
            words = [word for of_mode, word in goals if of_mode == mode]
            if words or mode == last:
                yield _line((*_row(result, mode), "; ".join(words)))


def _row(result: dict[str, Any], mode: str) -> tuple[str, ...]:
    found = result["modes"][mode]
    plain = {
        name: ratio["median"]
        for name, ratio in found["ratios"].items()
        if result["providers"][name]["kind"] == "plain"
    }
    best = min(plain, key=lambda name: plain[name]) if plain else ""
    in_graph = found["graph"].get("ours", {})
    tflops = result["figures"].get(f"{mode}.tflops", 0.0)
    return (
        result["name"],
        mode,
        duration(found["times"]["ours"]["median"]),
        duration(in_graph["median"]) if "median" in in_graph else "",
        f"{best} {plain[best]:.2f}x" if best else "",
        f"{tflops:.0f}" if tflops >= 1 else "",
    )


def _goals(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each goal's mode and words; what belongs to no mode stands with the last."""
    for goal in result["goals"]:
        words = f"{goal['against']} {goal['wanted']}: {goal['ratio']:.2f}x {_word(goal['met'])}"
        yield goal["mode"], words
    for goal in result["figure_goals"]:
        mode = goal["figure"].partition(".")[0]
        value = "-" if goal["value"] is None else f"{goal['value']:.3g}"
        words = f"{goal['figure']} {goal['wanted']}: {value} {_word(goal['met'])}"
        yield mode if mode in result["modes"] else list(result["modes"])[-1], words


def _word(met: bool | None) -> str:
    return {True: "met", False: "MISSED", None: "not measured"}[met]


def goals_met(results: list[dict[str, Any]]) -> tuple[int, int]:
    """How many goals are met, and how many there are."""
    words = [goal["met"] for result in results for goal in result["goals"]]
    words += [goal["met"] for result in results for goal in result["figure_goals"]]
    return sum(word is True for word in words), len(words)


def _line(cells: tuple[str, ...]) -> str:
    return " ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()
