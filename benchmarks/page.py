"""``docs/benchmarks.md`` from the stored results: ``python -m benchmarks.page``.

``--check`` writes nothing and exits with 1 when the page is not what the results give;
``--results FOLDER ... --out FILE`` makes a page of your own runs.
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks import output, sections
from benchmarks.environment import ROOT
from benchmarks.sections.machine import name_of
from benchmarks.sections.view import DEVICES, devices
from dit_models.atomic import write_text

PAGE = ROOT / "docs" / "benchmarks.md"
MARK = "<!-- Made by python -m benchmarks.page from stored results. Do not edit. -->"
DIFF_LINES = 30
# What else is stored: files (patterns), what they are, the document about them.
OTHERS = (
    ("models-*/**/report.md", "whole models, measured", "models.md#speed-of-whole-models"),
    ("swap-*/report.md", "blocks of published models before and after", "swapping.md#measured"),
    ("ablation-*/results.md", "quality of routings at equal activated compute", "ablation.md"),
    ("triton-compiled.md", "Triton kernels as compiled, no speed", "gpu.md"),
    ("cuda-compiled.md", "CUDA kernels as compiled, no speed", "cuda.md"),
    ("roofline.md", "arithmetic and traffic of layers, counted from shapes", "gpu.md"),
)


@dataclass(frozen=True)
class Stored:
    """A result document and its pictures, by the names that ``benchmarks.plots`` gives them."""

    path: Path
    document: dict[str, Any]
    pictures: dict[str, Path]

    @property
    def name(self) -> str:
        """Of the run's folder, or of its file."""
        is_folder = self.path.name == "results.json"
        return self.path.resolve().parent.name if is_folder else self.path.stem


def find(folder: Path) -> list[Stored]:
    """Result documents of a folder, those of a GPU first.

    A run's ``results.json`` stands in the folder itself or in one below, with every picture beside
    it; ``gpu_check`` writes ``<name>.json`` and ``<name>-*.png``.
    """
    found = []
    for path in sorted((*folder.glob("*.json"), *folder.glob("*/results.json"))):
        document = _result(path)
        if document is not None:
            prefix = "" if path.name == "results.json" else f"{path.stem}-"
            drawn = sorted(path.parent.glob(f"{prefix}*.png"))
            pictures = {picture.stem.removeprefix(prefix): picture for picture in drawn}
            found.append(Stored(path, document, pictures))
    return sorted(found, key=lambda stored: "cuda" not in devices(stored.document))


def _result(path: Path) -> dict[str, Any] | None:
    """The document when the file holds one; other commands store other things."""
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    keys = ("environment", "settings", "entries")
    is_result = isinstance(document, dict) and all(key in document for key in keys)
    return document if is_result else None


def page(results: Sequence[Stored], out: Path, others: Iterable[str] = ()) -> str:
    """The page's text.

    Args:
        results: to show.
        out: where it will stand; links are relative to it.
        others: lines about what else is stored.
    """
    lines = [MARK, "", "# Benchmarks", "", *_introduction(results, out)]
    for stored in results:
        links = {name: _link(picture, out) for name, picture in stored.pictures.items()}
        lines += [f"## {stored.name}: {name_of(stored.document)}", ""]
        lines += [_documents(stored, out), ""]
        lines += sections.about(stored.document, links, "###")
    lines += others
    return "\n".join(lines).rstrip() + "\n"


def _introduction(results: Sequence[Stored], out: Path) -> Iterator[str]:
    readme = _link(ROOT / "benchmarks" / "README.md", out)
    yield "Made from stored results by `python -m benchmarks.page`;"
    yield f"[how it is measured]({readme})."
    yield ""
    yield "- Every provider's outputs and gradients are compared with fp64 before it is timed."
    yield "- Times are medians. *other/ours*, as in `2.00x (1.90-2.10)`, is the median, with"
    yield "  quartiles, of ratios taken round by round: **above 1 ours is faster**."
    yield "- *strongest*: the fastest alternative of an entry and mode. *usual code*: what is"
    yield "  published for a layer, PyTorch's usual calls for an op."
    yield ""
    found = {device for stored in results for device in devices(stored.document)}
    absent = [name for device, name in DEVICES.items() if device not in found]
    for name in absent:
        yield f"**No result of a {name} is stored: nothing on this page was measured on one.**"
        yield ""


def _documents(stored: Stored, out: Path) -> str:
    """Links to every figure of a run."""
    links = [f"[{stored.path.name}]({_link(stored.path, out)})"]
    for suffix in (".md", ".csv"):
        path = stored.path.with_suffix(suffix)
        links += [f"[{path.name}]({_link(path, out)})"] if path.exists() else []
    return f"All figures: {', '.join(links)}."


def _link(path: Path, out: Path) -> str:
    """As Markdown wants it: no spaces, brackets or parentheses."""
    return quote(Path(os.path.relpath(path.resolve(), out.resolve().parent)).as_posix())


def others_of(folder: Path, out: Path) -> Iterator[str]:
    """What else is stored in the library's own folder of results."""
    rows = []
    for pattern, words, about in OTHERS:
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder).as_posix()
            link = _link(ROOT / "docs" / about.partition("#")[0], out)
            anchor = about.partition("#")[2]
            link = f"{link}#{anchor}" if anchor else link
            rows.append(f"- [{name}]({_link(path, out)}): {words} ([about]({link}))")
    if rows:
        yield from ("## What else is stored", "", *rows)


def default_page() -> str:
    """What ``docs/benchmarks.md`` has to be."""
    return page(find(output.RESULTS), PAGE, others_of(output.RESULTS, PAGE))


def difference(stands: str, wanted: str) -> str:
    """The first lines that differ, or nothing."""
    lines = difflib.unified_diff(
        stands.splitlines(), wanted.splitlines(), "stands", "wanted", n=0, lineterm=""
    )
    return "\n".join(islice(lines, DIFF_LINES))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 when the page differs")
    parser.add_argument("--results", nargs="+", type=Path, metavar="FOLDER", help="your own runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="needed with --results")
    parser.add_argument("--force", action="store_true", help="replace a file that is no such page")
    options = parser.parse_args(arguments)
    if bool(options.results) != bool(options.out):
        parser.error("--results FOLDER ... and --out FILE belong together")
    out = options.out or PAGE
    try:
        text = _own(options.results, out) if options.results else default_page()
        stands = out.read_text() if out.exists() else ""
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.check:
        changes = difference(stands, text)
        print(changes or f"{out} is what the results give")
        if changes:
            print(f"{out} differs: run python -m benchmarks.page")
        return 1 if changes else 0
    if stands and not stands.startswith(MARK) and not options.force:
        parser.error(f"{out} is no page of this command; give another --out, or --force")
    write_text(out, text)
    print(f"wrote {out}")
    return 0


def _own(folders: Sequence[Path], out: Path) -> str:
    results = [stored for folder in folders for stored in find(folder)]
    if not results:
        names = ", ".join(map(str, folders))
        raise ValueError(f"no results.json in {names}; expected folders that benchmarks.run wrote")
    return page(results, out)


if __name__ == "__main__":
    sys.exit(main())
