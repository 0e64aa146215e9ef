"""``results.md`` from ``results.json``; ``--compare`` sets two runs side by side.

``python -m benchmarks.report FOLDER`` writes the report again;
``python -m benchmarks.report --compare A B`` is ``python -m benchmarks.run --compare A B``.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import compare, digest, output, sections, table, words
from benchmarks.gpu import table as gpu_table
from benchmarks.sections.background import summary_of
from dit_models.atomic import write_text


def markdown(document: dict[str, Any], pictures: Iterable[Path] = (), prefix: str = "") -> str:
    """The digest as on ``docs/benchmarks.md``, then every figure, then the whole header.

    Args:
        document: of a run.
        pictures: drawn of it, in the folder of the report.
        prefix: how their names begin.
    """
    results = document["entries"]
    links = {picture.stem.removeprefix(prefix): picture.name for picture in pictures}
    lines = ["# Benchmark results", "", *sections.about(document, links, "##")]
    lines += ["## All figures", ""]
    for group in digest.by_group(results).values():
        lines += [*_group(group), ""]
    lines += ["## Environment and settings", "", *_header(document)]
    return "\n".join(lines) + "\n"


def _header(document: dict[str, Any]) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    for key, value in {**document["environment"], **document["settings"]}.items():
        if isinstance(value, dict):
            value = words.listed(f"{name}: {item}" for name, item in value.items())
        elif isinstance(value, (list, tuple)):
            value = words.listed(map(str, value))
        yield f"| {key} | {'' if value is None else words.cell(str(value))} |"


def _group(results: list[dict[str, Any]]) -> Iterator[str]:
    yield f"### {table.group_of(results[0])}"
    yield ""
    yield from dict.fromkeys(
        f"- `{name}`: {summary_of(result['stage'], name)}"
        for result in results
        for name in result["providers"]
    )
    yield ""
    kind = gpu_table if gpu_table.is_gpu(results[0]) else table
    yield from (kind.LEGEND, "")
    yield from words.table(kind.COLUMNS, (row for result in results for row in kind.rows(result)))


def main(arguments: list[str] | None = None) -> int:
    """Write a report, or print a comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", type=Path, help="a run's folder, or its JSON file")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"))
    options = parser.parse_args(arguments)
    if (options.folder is None) == (options.compare is None):
        parser.error("give either a folder or --compare A B")
    try:
        if options.compare:
            print(compare.text(*(output.read_run(path) for path in options.compare)))
            return 0
        written = _again(options.folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {written}")
    return 0


def _again(path: Path) -> Path:
    """Write the report of a stored document beside it."""
    stored = path / "results.json" if path.is_dir() else path
    prefix = "" if stored.name == "results.json" else f"{stored.stem}-"
    drawn = sorted(stored.parent.glob(f"{prefix}*.png"))
    written = stored.with_suffix(".md")
    write_text(written, markdown(output.read_run(stored), drawn, prefix))
    return written


if __name__ == "__main__":
    sys.exit(main())
