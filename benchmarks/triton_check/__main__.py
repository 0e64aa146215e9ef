"""Compile every Triton kernel for GPUs that are not here: ``python -m benchmarks.triton_check``.

Launches are recorded from the real launchers on meta tensors, compiled for every target, and read
from the binaries: registers, spills, shared memory, occupancy, tensor-core instructions. A second
pass looks for 32-bit address arithmetic that large tensors overflow. Exits with 1 on any finding.
"""

import argparse
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import triton

from benchmarks.triton_check import report, rules
from benchmarks.triton_check.addresses import overflows
from benchmarks.triton_check.build import build, summary
from benchmarks.triton_check.cases import (
    CASES,
    HUGE_CASES,
    OTHER_DTYPES,
    Case,
    largest_index,
)
from benchmarks.triton_check.record import (
    OTHER_DTYPE_TARGETS,
    collect,
    grid_problem,
    missing_ops,
    unused_configs,
)
from benchmarks.triton_check.specialize import Compilation
from benchmarks.triton_check.targets import GPUS

# Address arithmetic differs only between pointers and descriptors.
ADDRESS_TARGETS = ("sm_80", "sm_90")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing is compiled then")
    partial = bool(options.only) or set(options.targets) != set(GPUS)
    if options.update and partial:
        parser.error("--update needs every case and target: no --only, no --targets")
    os.environ["MOE_KERNELS_TUNE"] = "off"  # what is shipped, not what somebody tuned here
    start = time.perf_counter()
    missing = missing_ops()
    problems = [f"no Triton kernel for {name}" for name in missing]
    chosen = _Chosen(options.targets, options.only, missing)
    compilations = _compilations(chosen, problems)
    if not partial:
        problems += unused_configs(compilations)
    if options.list:
        for compilation in compilations:
            print(
                compilation.arch, compilation.kernel, compilation.case.name, compilation.constants
            )
        return 0
    print(f"Triton {triton.__version__}: {len(compilations)} binaries", flush=True)
    problems += _overflows(chosen)
    addresses = time.perf_counter() - start
    rows = _compile(compilations, options.jobs, problems)
    if options.check:
        lost, remark = rules.compare(rows, report.read(), triton.__version__)
        problems += lost
        print(remark)
    if options.update:
        report.write(rows)
        print(f"Wrote {report.TABLE} and the page beside it")
    for problem in problems:
        print(f"FAIL {problem}")
    seconds = time.perf_counter() - start
    print(f"{len(rows)} compiled, {len(problems)} findings, {seconds:.0f} s ({addresses:.0f} s "
          "for recording and addresses)")  # fmt: skip
    return 1 if problems else 0


@dataclass(frozen=True)
class _Chosen:
    """Which targets and cases take part."""

    targets: list[str]
    pattern: str
    missing: list[str]

    def among(self, cases: Sequence[Case]) -> list[Case]:
        return [
            case
            for case in cases
            if re.search(self.pattern, case.name) and case.op not in self.missing
        ]


def _compilations(chosen: _Chosen, problems: list[str]) -> list[Compilation]:
    found = []
    for arch in chosen.targets:
        cases = chosen.among(CASES)
        if arch in OTHER_DTYPE_TARGETS:
            cases += chosen.among(OTHER_DTYPES)
        for launch, compilation in collect(cases, arch, problems.append):
            problem = grid_problem(launch)
            problems += [f"{compilation.case.name}: {problem}"] if problem else []
            found.append(compilation)
    return found


def _overflows(chosen: _Chosen) -> list[str]:
    problems: list[str] = []
    for arch in ADDRESS_TARGETS:
        for launch, compilation in collect(chosen.among(HUGE_CASES), arch, problems.append):
            problem = grid_problem(launch)
            problems += [f"{compilation.case.name}: {problem}"] if problem else []
            try:
                largest = largest_index(compilation.case)
                found = [str(overflow) for overflow in overflows(launch, compilation, largest)]
            except Exception as error:  # the frontend raises many types
                found = [f"{compilation.kernel} of {compilation.case.name}: {summary(error)}"]
            problems += found
    return list(dict.fromkeys(problems))


def _compile(
    compilations: list[Compilation], jobs: int | None, problems: list[str]
) -> list[rules.Row]:
    rows = []
    seconds: defaultdict[str, float] = defaultdict(float)
    for count, built in enumerate(build(compilations, jobs), 1):
        compilation = built.compilation
        seconds[compilation.kernel] += built.seconds
        if built.figures is None:
            name = f"{compilation.kernel} [{compilation.arch}] of {compilation.case.name}"
            problems.append(f"{name}, {compilation.constants}: {built.error}")
            continue
        row = rules.row_of(built)
        problems += rules.broken(row)
        rows.append(row)
        if count % 50 == 0:
            print(f"  {count} of {len(compilations)}", flush=True)
    ranked = sorted(seconds.items(), key=lambda item: -item[1])[:5]
    slowest = [f"{name} {spent:.0f} s" for name, spent in ranked]
    print(f"Most time, over all processes: {', '.join(slowest)}")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.triton_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", nargs="+", choices=sorted(GPUS), default=list(GPUS))
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--jobs", type=int, help="processes; as many as processors by default")
    parser.add_argument("--list", action="store_true", help="print what would be compiled")
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--check", action="store_true", help="compare with the kept table")
    table.add_argument("--update", action="store_true", help="replace the kept table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
