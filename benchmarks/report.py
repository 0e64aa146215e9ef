"""``results.md`` from ``results.json``; ``--compare`` sets two runs side by side.

``python -m benchmarks.report FOLDER`` writes the report again;
``python -m benchmarks.report --compare A B`` prints how our times changed from A to B.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import output, table
from benchmarks.gpu import table as gpu_table
from benchmarks.ratios import quantile
from benchmarks.stages import STAGES
from dit_models.atomic import write_text


def markdown(document: dict[str, Any]) -> str:
    """Header, a table for each stage, goals, where it is slower, how to repeat it."""
    results = document["entries"]
    lines = ["# Benchmark results", ""]
    if not document["complete"]:
        lines += ["**Interrupted: not every entry was run.**", ""]
    lines += [*_header(document), ""]
    for group in dict.fromkeys(table.group_of(result) for result in results):
        lines += [*_group([result for result in results if table.group_of(result) == group]), ""]
    lines += ["## Goals", "", *_goals(results), ""]
    if any(map(gpu_table.is_gpu, results)):
        lines += [*_gpu_sections(document), ""]
    slower = table.slower_lines(results)
    lines += ["## Where it is slower", "", "A plain alternative beats ours by more than 3 %:", ""]
    lines += [f"- {line}" for line in slower] if slower else ["Nowhere in this run."]
    lines += ["", "## How to reproduce", "", "```", document["environment"]["command"], "```"]
    return "\n".join(lines) + "\n"


def _header(document: dict[str, Any]) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    for key, value in {**document["environment"], **document["settings"]}.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name}: {item}" for name, item in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(str(item) for item in value)
        yield f"| {key} | {_cell(str(value))} |"


def _group(results: list[dict[str, Any]]) -> Iterator[str]:
    yield f"## {table.group_of(results[0])}"
    yield ""
    yield from dict.fromkeys(
        f"- `{name}`: {STAGES[result['stage']].providers[name].summary}"
        for result in results
        for name in result["providers"]
    )
    yield ""
    on_gpu = gpu_table.is_gpu(results[0])
    if on_gpu:
        yield from (gpu_table.LEGEND, "")
    columns = gpu_table.COLUMNS if on_gpu else table.COLUMNS
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for result in results:
        for row in gpu_table.rows(result) if on_gpu else table.rows(result):
            yield "| " + " | ".join(_cell(cell) for cell in row) + " |"


def _goals(results: list[dict[str, Any]]) -> Iterator[str]:
    goals = [(result["name"], goal) for result in results for goal in result["goals"]]
    if not goals:
        yield "None of these entries has a goal."
        return
    met = sum(goal["met"] for _, goal in goals)
    yield f"{met} of {len(goals)} met. They are meant for an idle machine."
    yield ""
    yield "| entry | mode | against | wanted | other/ours | |"
    yield "|---|---|---|---|---|---|"
    for name, goal in sorted(goals, key=lambda item: item[1]["met"]):
        word = "met" if goal["met"] else "**missed**"
        measured = f"{goal['mode']} | {goal['against']} | {goal['wanted']} | {goal['ratio']:.2f}x"
        yield f"| {name} | {measured} | {word} |"


def _gpu_sections(document: dict[str, Any]) -> Iterator[str]:
    """Figures of a GPU, what was not measured, and the first calls."""
    yield "| entry | figure | wanted | measured | |"
    yield "|---|---|---|---|---|"
    for row in gpu_table.goal_rows(document["entries"]):
        yield "| " + " | ".join(map(_cell, row)) + " |"
    for item in document.get("not_measured", []):
        yield f"- not measured: {item['name']} ({_cell(item['reason'])})"
    for name, found in document.get("first_call", {}).items():
        words = ", ".join(f"{key} {value:.1f}" for key, value in found.items())
        yield f"- first call of {name}, with empty caches: {words}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Our time in both runs; the peers' own change shows what the machine contributed."""
    old = {result["name"]: result for result in before["entries"]}
    lines = [f"{'entry':34} {'mode':9} {'before':>10} {'after':>10} {'ours':>7} {'peers':>7}"]
    for result in after["entries"]:
        known = old.get(result["name"], {"modes": {}})
        for mode, found in result["modes"].items():
            if mode not in known["modes"]:
                continue
            first = {name: time["median"] for name, time in known["modes"][mode]["times"].items()}
            second = {name: time["median"] for name, time in found["times"].items()}
            peers = [second[n] / first[n] for n in first if n in second and n != "ours"]
            cells = [table.duration(first["ours"]), table.duration(second["ours"])]
            change = f"{second['ours'] / first['ours']:6.2f}x"
            drift = f"{quantile(peers, 0.5):6.2f}x" if peers else "-"
            lines.append(
                f"{result['name']:34} {mode:9} {cells[0]:>10} {cells[1]:>10} {change} {drift:>7}"
            )
    if len(lines) == 1:
        return "The two runs have no entry and mode in common."
    lines.append("after/before: below 1 is faster; 'peers' is the median over the other providers.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Write a report, or print a comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", type=Path, help="a run's folder or results.json")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"))
    options = parser.parse_args(arguments)
    if (options.folder is None) == (options.compare is None):
        parser.error("give either a folder or --compare A B")
    try:
        if options.compare:
            print(compare(*(output.read(path) for path in options.compare)))
            return 0
        folder = options.folder if options.folder.is_dir() else options.folder.parent
        write_text(folder / "results.md", markdown(output.read(options.folder)))
    except OSError as error:
        parser.error(str(error))
    print(f"wrote {folder / 'results.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
