"""Whole models on this machine: ``python -m benchmarks.models``.

(a) Sampling with a converted DiT-MoE-S/2-8E2A beside the loop that it was published with.
(b) Latency of EC-DiT over its dense twin at equal activated multiply-accumulates.

Both sides take turns in one process; ratios are medians of the ratios inside the rounds. Weights
are random, outputs are compared before anything is timed.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe
from benchmarks.models.latency import Twins, latency, twins
from benchmarks.models.sampling import MODEL, PUBLISHED_STEPS, compare, pair, throughput
from benchmarks.output import claim, write

PARTS = ("sampling", "latency")
QUICK_STEPS = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, write them where asked."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if min(options.batch) < 1:
        _parser().error(f"--batch {min(options.batch)}; expected at least 1")
    chosen = [each for each in twins(options.quick) if _wanted(each, options.models)]
    if not chosen:
        names = ", ".join(each.name for each in twins())
        _parser().error(f"--models {' '.join(options.models)} matches none of {names}")
    words = sys.argv[1:] if arguments is None else arguments
    document = describe(words, module="benchmarks.models")
    document |= {"dtype": options.dtype, "quick": options.quick, "sampling": None, "latency": []}
    folder = claim(options.out, options.force) if options.out else None
    repeats, seconds = (1, 0.0) if options.quick else (1000, options.seconds)

    def keep() -> None:
        if folder is not None:
            write(folder, document)

    if "sampling" in options.only:
        model, published = pair(options.quick)
        error = compare(model, published)
        steps = QUICK_STEPS if options.quick else options.steps
        results = throughput(
            model,
            published,
            options.batch,
            dtype=DTYPES[options.dtype],
            steps=steps,
            seconds=seconds,
            repeats=repeats,
        )
        document["sampling"] = {"model": MODEL, "steps": steps, "error": error, "results": results}
        keep()
        print("\n".join(sampling_table(document["sampling"])), end="\n\n", flush=True)
        del model, published
    if "latency" in options.only:
        print("\n".join(LATENCY_HEAD), flush=True)
        for each in chosen:
            results = latency(
                each,
                options.batch,
                dtype=DTYPES[options.dtype],
                seconds=seconds,
                repeats=repeats,
            )
            entry = {"model": each.name, "macs_ratio": each.macs_ratio, "results": results}
            document["latency"].append(entry)
            keep()
            print("\n".join(latency_rows(entry)), flush=True)
    if folder is not None:
        (folder / "report.md").write_text(report(document))
    return 0


def sampling_table(found: dict[str, Any]) -> list[str]:
    """Part (a) as Markdown, a line a batch size."""
    lines = [
        f"| {found['model']}, images | published, s a step | ours, s a step "
        f"| images/s at {PUBLISHED_STEPS} steps | published / ours | quartiles |",
        "|---|---|---|---|---|---|",
    ]
    for result in found["results"]:
        rates, low_high = result["images_per_second"], result["quartiles"]
        lines.append(
            f"| {result['batch_size']} | {result['seconds']['published']:.3f} "
            f"| {result['seconds']['ours']:.3f} | {rates['published']:.4f} → {rates['ours']:.4f} "
            f"| **{result['ratio']:.2f}x** | {low_high[0]:.2f}-{low_high[1]:.2f} |"
        )
    return lines


LATENCY_HEAD = [
    "| model, images | dense twin, ms | sparse, ms | sparse / dense | quartiles | MACs ratio |",
    "|---|---|---|---|---|---|",
]


def latency_rows(entry: dict[str, Any]) -> list[str]:
    """A line of part (b) for each batch size of a pair."""
    return [
        f"| {entry['model']}, {result['batch_size']} | {1e3 * result['seconds']['dense']:.1f} "
        f"| {1e3 * result['seconds']['sparse']:.1f} | **{result['ratio']:.3f}** "
        f"| {result['quartiles'][0]:.3f}-{result['quartiles'][1]:.3f} "
        f"| {entry['macs_ratio']:.4f} |"
        for result in entry["results"]
    ]


def report(document: dict[str, Any]) -> str:
    """All tables, with what a reader needs to repeat them."""
    lines = [
        "# Whole models",
        "",
        f"`{document['command']}` on {document['cpu']}, {document['threads']} threads, "
        f"weights in {document['dtype']}, "
        f"torch {document['torch']}, {document['date']}, commit {document['commit']}, "
        f"load {document['load_average']}.",
        "",
    ]
    if document["quick"]:
        lines += ["A quick run: small models and few rounds, the times mean nothing.", ""]
    if document["sampling"]:
        lines += [*sampling_table(document["sampling"]), ""]
    if document["latency"]:
        lines += LATENCY_HEAD
        for entry in document["latency"]:
            lines += latency_rows(entry)
    return "\n".join(lines).rstrip() + "\n"


def _wanted(each: Twins, words: list[str] | None) -> bool:
    return not words or any(word in each.name for word in words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    parser.add_argument("--models", nargs="+", help="twins whose name contains one of these words")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="batch sizes (1 8)")
    parser.add_argument("--steps", type=int, default=2, help="sampling steps of one round (2)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each figure (60)")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all weights")
    parser.add_argument(
        "--quick", action="store_true", help="small models, few rounds: does it run"
    )
    parser.add_argument("--out", type=Path, help="folder for results.json and report.md")
    parser.add_argument("--force", action="store_true", help="write into a folder with files in it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
