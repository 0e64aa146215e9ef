"""Which backend the automatic choice takes first, from a result of ``make gpu-check``.

``python -m benchmarks.choose benchmarks/results/<gpu>-<date>.json`` says for every op that was
timed by both the CUDA and the Triton backend which one it should be on that GPU, and why.
``--update`` writes that to the table of ``moe_kernels.backends.measured``, which cites the file.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import output
from benchmarks.entry import BY_BACKEND, OURS_CUDA, OURS_TRITON
from benchmarks.environment import ROOT
from benchmarks.ratios import quantile
from benchmarks.registry_gpu import GPU_ENTRIES
from dit_models.atomic import write_text
from moe_kernels.backends import BACKENDS, OPS, measured
from moe_kernels.backends.measured import Measured

# How many times as fast as Triton the CUDA backend has to be: at every shape and in every mode ...
EVERYWHERE = 1.0
# ... and in the forward of every shape, where it has to earn its place.
FORWARD = {"expert_choice": 1.5}


@dataclass
class Comparison:
    """What a result says of one op.

    Attributes:
        op: one of ``OPS``.
        shapes: names of the entries in the result.
        speedups: time of Triton over that of CUDA, by entry and mode.
        missing: why an entry of the suite has none.
    """

    op: str
    shapes: list[str] = field(default_factory=list)
    speedups: dict[tuple[str, str], float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def forward(self) -> dict[str, float]:
        """Speedup of the forward by entry."""
        return {
            shape: speedup for (shape, mode), speedup in self.speedups.items() if mode == "forward"
        }

    def why_triton(self) -> str | None:
        """Why the op stays with Triton; ``None`` when CUDA is to be chosen."""
        if self.missing:
            return "; ".join(f"{shape}: {reason}" for shape, reason in self.missing.items())
        slower = [
            f"{shape} {mode} {speedup:.2f}x"
            for (shape, mode), speedup in self.speedups.items()
            if speedup < EVERYWHERE
        ]
        if slower:
            return f"cuda is slower at {', '.join(slower)}"
        wanted = FORWARD.get(self.op, EVERYWHERE)
        shape, smallest = min(self.forward.items(), key=lambda item: item[1])
        if smallest < wanted:
            return (
                f"cuda's forward is {smallest:.2f}x as fast at {shape}, "
                f"wanted is {wanted:g}x at every shape"
            )
        return None


def compare(document: dict[str, Any]) -> list[Comparison]:
    """Every op that the results have by both backends, in the order of the pipeline.

    Raises:
        ValueError: when tests or compute-sanitizer failed in that run; names them.
    """
    _refuse_failed(document)
    found: dict[str, Comparison] = {}
    for result in document["entries"]:
        op, shape = result["stage"], result["name"]
        if op not in OPS or not result["providers"].keys() >= set(BY_BACKEND):
            continue
        comparison = found.setdefault(op, Comparison(op))
        comparison.shapes.append(shape)
        reason = _why_not_compared(result)
        if reason is not None:
            comparison.missing[shape] = reason
        for mode, timed in result["modes"].items() if reason is None else ():
            cuda, triton = (timed["times"][name]["median"] for name in (OURS_CUDA, OURS_TRITON))
            comparison.speedups[shape, mode] = triton / cuda
    reasons = {item["name"]: item["reason"] for item in document.get("not_measured", [])}
    for entry in GPU_ENTRIES:
        suite = found.get(entry.stage)
        if suite and set(BY_BACKEND) <= set(entry.providers) and entry.name not in suite.shapes:
            reason = reasons.get(entry.name, "it was left out of the run")
            suite.missing[entry.name] = f"not measured ({reason})"
    return [found[op] for op in OPS if op in found]


def _refuse_failed(document: dict[str, Any]) -> None:
    checks = {**document.get("tests", {}), **document.get("sanitizer", {})}
    failed = [name for name, found in checks.items() if found["failed"]]
    if failed:
        raise ValueError(
            f"the run of these results failed in {', '.join(failed)}; times of kernels that may be "
            "wrong decide nothing: mend them and run make gpu-check again."
        )


def _why_not_compared(result: dict[str, Any]) -> str | None:
    for name in BY_BACKEND:
        verdict = result["providers"][name]
        if verdict["status"] != "ok":
            return f"{name} is {verdict['status']} ({verdict['reason']})"
    if not result["modes"]:
        return "it was not timed, because ours is wrong"
    return None if "forward" in result["modes"] else "the forward was not timed"


def architecture(document: dict[str, Any]) -> str:
    """The GPU of a result, named as ``moe_kernels.backends.measured`` does.

    Raises:
        ValueError: when it was not an NVIDIA GPU.
    """
    device = document.get("environment", {}).get("device", {})
    if not device.get("cuda"):
        raise ValueError(
            "the results are not of gpu_check on an NVIDIA GPU; only there both backends run."
        )
    return "sm_" + str(device["capability"]).replace(".", "")


def cite(path: Path) -> str:
    """A result's path from the repository's root.

    Raises:
        ValueError: when it does not lie under ``benchmarks/results``.
    """
    try:
        cited = path.resolve().relative_to(ROOT).as_posix()
    except ValueError:
        cited = ""
    if not cited.startswith(measured.RESULTS):
        raise ValueError(f"{path} is not under {measured.RESULTS}; put it there, it will be cited.")
    return cited


def choices(document: dict[str, Any], cited: str) -> list[Measured]:
    """Entries of the table that follow from a result.

    Raises:
        ValueError: as ``architecture`` and ``compare``.
    """
    arch = architecture(document)
    return [
        Measured(
            op=comparison.op,
            arch=arch,
            backend="cuda",
            over="triton",
            ratio=round(quantile(list(comparison.forward.values()), 0.5), 3),
            measurement=cited,
            entries=tuple(comparison.shapes),
        )
        for comparison in compare(document)
        if comparison.why_triton() is None
    ]


def update(table: Path, ops: Iterable[str], arch: str, chosen: Iterable[Measured]) -> None:
    """Replace what a table says of these ops on this architecture; the rest stays."""
    kept = measured.read(table, OPS, BACKENDS)
    for op in ops:
        kept.pop((op, arch), None)
    kept |= {(entry.op, entry.arch): entry for entry in chosen}
    ordered = sorted(kept.values(), key=lambda entry: (entry.arch, OPS.index(entry.op)))
    lines = [json.dumps(asdict(entry)) for entry in ordered]
    write_text(table, "[\n " + ",\n ".join(lines) + "\n]\n" if lines else "[]\n")


def main(arguments: list[str] | None = None) -> int:
    """Print the choices, and write them with ``--update``; 2 for results that decide nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.choose",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="a file of gpu_check under benchmarks/results")
    parser.add_argument("--update", action="store_true", help="write the table")
    options = parser.parse_args(arguments)
    try:
        document, cited = output.read(options.results), cite(options.results)
        arch, compared = architecture(document), compare(document)
    except (OSError, ValueError) as error:
        print(f"choose: {error}", file=sys.stderr)
        return 2
    if not compared:
        print(f"choose: {cited} has no op with {' and '.join(BY_BACKEND)}", file=sys.stderr)
        return 2
    chosen = choices(document, cited)
    for comparison in compared:
        reason = comparison.why_triton()
        if reason is not None:
            print(f"{comparison.op} on {arch} stays with triton: {reason}")
    for entry in chosen:
        print(entry.words())
    for item in document.get("not_measured", []):
        print(f"not measured: {item['name']} ({item['reason']})")
    if options.update:
        update(measured.TABLE, [comparison.op for comparison in compared], arch, chosen)
        print(f"wrote {measured.TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
