"""Time and memory of published MoE blocks before and after a swap: ``python -m benchmarks.swap``.

Each block is swapped with ``verify=True`` first; a block that does not compute the same is not
timed. Both versions take turns in one process, medians of ratios are reported.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe
from benchmarks.output import claim, write
from benchmarks.swap.blocks import BLOCKS
from benchmarks.swap.measure import graph_breaks, memory, times


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write it where asked."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    document = describe(sys.argv[1:], device, "benchmarks.swap")
    document["blocks"] = []
    folder = claim(options.out, options.force) if options.out else None
    for block in BLOCKS:
        if options.only and not any(word in block.name for word in options.only):
            continue
        found: dict[str, Any] = {"name": block.name, "tokens": {}}
        try:
            for tokens in options.tokens:
                found["tokens"][str(tokens)] = times(block, tokens, device, options.seconds)
            if not options.no_memory:
                found["memory"] = memory(block, max(options.tokens), device)
            if not options.no_compile:
                found["graph_breaks"] = graph_breaks(block)
        except ImportError as error:
            found["skipped"] = str(error)
        document["blocks"].append(found)
        print(row(found), flush=True)
        if folder is not None:
            write(folder, document)
    if folder is not None:
        (folder / "report.md").write_text(table(document))
    return 0


HEAD = (
    "| block | tokens | forward, ms | | forward + backward, ms | | kept for backward, peak memory "
    "| graph breaks |"
)


def table(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [HEAD, "|---|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *map(row, document["blocks"])]) + "\n"


def row(found: dict[str, Any]) -> str:
    """A line for each number of tokens of a block."""
    if "skipped" in found:
        return f"| {found['name']} | skipped: {found['skipped']} | | | | | | |"
    lines = []
    for number, (tokens, modes) in enumerate(found["tokens"].items()):
        cells = [found["name"] if number == 0 else "", tokens]
        for mode in ("forward", "both"):
            before, after = (1e3 * modes[mode][name] for name in ("original", "swapped"))
            cells += [f"{before:.2f} → {after:.2f}", f"**{modes[mode]['ratio']:.2f}x**"]
        last = number == len(found["tokens"]) - 1
        memory_ratios = found.get("memory")
        told = ""
        if last and memory_ratios:
            told = f"{memory_ratios['saved_ratio']:.2f}, {memory_ratios['peak_ratio']:.2f}"
        cells.append(told)
        breaks = found.get("graph_breaks")
        cells.append(f"{breaks['original']} → {breaks['swapped']}" if last and breaks else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swap", description=__doc__)
    parser.add_argument("--only", nargs="+", help="blocks whose name contains one of these words")
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each figure")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="do not count graph breaks")
    parser.add_argument("--out", type=Path, help="folder for results.json and report.md")
    parser.add_argument("--force", action="store_true", help="write into a folder with files in it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
