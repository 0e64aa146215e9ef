"""Check the CUDA kernels as nvcc compiled them: ``python -m benchmarks.cuda_check``.

Reads what ptxas said while the last build compiled them for every architecture: registers, spills,
stack, shared memory. No GPU is needed. Exits with 1 on any finding.
"""

import argparse
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cuda_check import report, rules
from benchmarks.cuda_check.remarks import parse, readable
from moe_kernels.build_info import build_record, why_not_built

ROOT = Path(__file__).resolve().parents[2]
BUILD = "MOE_KERNELS_BUILD=cuda python setup.py build_ext --inplace"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--check", action="store_true", help="compare with the kept table")
    table.add_argument("--update", action="store_true", help="replace the kept table")
    options = parser.parse_args(arguments)
    record = build_record().get("cuda", {})
    if not record.get("built"):
        parser.error(f"moe_kernels._cuda {why_not_built('cuda')}\n{BUILD} compiles it")
    version = record["compiler"]
    rows, problems = read_build(build_folder(), ROOT / "csrc" / "cuda", record["archs"])
    problems += [problem for row in rows for problem in rules.broken(row)]
    kept = report.read()
    if options.check:
        lost, remark = rules.compare(rows, kept, version)
        problems += lost
        print(remark)
    if options.update:
        archs = {row.fields["arch"] for row in rows}
        missing = {fields["arch"] for fields in kept["rows"].values()} - archs
        if missing:
            parser.error(
                f"the kept table also has {', '.join(sorted(missing))}, which this build was not "
                f"compiled for; unset TORCH_CUDA_ARCH_LIST and build again: {BUILD}"
            )
        report.write(rows, version)
        print(f"Wrote {report.TABLE} and the page beside it")
    for problem in problems:
        print(f"FAIL {problem}")
    kernels = len({(row.fields["file"], row.fields["kernel"]) for row in rows})
    print(f"{kernels} kernels for {', '.join(record['archs'])} by {version}, "
          f"{len(problems)} findings")  # fmt: skip
    return 1 if problems else 0


def build_folder() -> Path:
    """Where csrc/build_cuda.py leaves the objects of this Python."""
    return ROOT / "build" / f"cuda.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def read_build(
    folder: Path, sources: Path, archs: Sequence[str]
) -> tuple[list[rules.Row], list[str]]:
    """Rows of every kernel, and a finding for each source without remarks on an architecture.

    Args:
        folder: with the remarks, a file ``<source>.ptxas`` for each source.
        sources: folder of the ``.cu`` files.
        archs: that were compiled for, as in ``_build.json``.
    """
    rows, problems = [], []
    expected = {"sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in archs}
    for source in sorted(sources.glob("*.cu")):
        path = folder / f"{source.stem}.ptxas"
        if not path.exists():
            problems.append(f"{path} is missing: {BUILD}")
            continue
        found = parse(path.read_text())
        lacking = expected - {figures.arch for figures in found} if found else set()
        if lacking:
            problems.append(f"{path} has no kernel for {', '.join(sorted(lacking))}: {BUILD}")
        names = readable([figures.symbol for figures in found])
        rows += [rules.row_of(source.stem, n, f) for n, f in zip(names, found, strict=True)]
    return rows, problems


if __name__ == "__main__":
    sys.exit(main())
