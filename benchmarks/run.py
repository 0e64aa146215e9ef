"""Run a suite: ``python -m benchmarks.run --suite cpu``.

Every provider is checked against fp64 before it is timed; all providers of an entry are timed in
turns in one process. Results, a report and plots go to ``benchmarks/results/<name>/``.
"""

import argparse
import datetime
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import output, plots, report, table
from benchmarks.busy import busy
from benchmarks.entry import CPU, MODES, Entry
from benchmarks.environment import describe
from benchmarks.gpu import runner as gpu_runner
from benchmarks.gpu import table as gpu_table
from benchmarks.registry import SUITES
from benchmarks.runner import Settings, failed, run_entry
from dit_models.atomic import write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 when ours is wrong somewhere."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        entries = select(options.suite, options.only)
        if options.list:
            print("\n".join(_listed(entry) for entry in entries))
            return 0
        device = choose_device(options.device, options.suite)
        folder = output.claim(options.out or _default_folder(options.suite), options.force)
        if not options.no_plots and importlib.util.find_spec("matplotlib") is None:
            raise ValueError(
                'plots need matplotlib: pip install "dit-moe-kernels[bench]", or give --no-plots'
            )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        repeats=options.repeats,
        seconds=options.seconds,
        modes=tuple(options.modes),
        compiled=not options.no_compile,
        memory=not options.no_memory,
    )
    document: dict[str, Any] = {
        "environment": describe(sys.argv[1:] if arguments is None else arguments, device),
        "settings": {"suite": options.suite, "busy": options.busy, **asdict(settings)},
        "complete": False,
        "entries": [],
    }
    _print_header(document)
    with busy(options.busy):
        document["complete"] = _run(entries, settings, folder, document, device)
    _finish(folder, document, draw=not options.no_plots)
    wrong = [result["name"] for result in document["entries"] if failed(result)]
    if wrong:
        print(f"FAIL: ours is wrong in {', '.join(wrong)}")
    return 1 if wrong or not document["complete"] else 0


def select(suite: str, pattern: str) -> list[Entry]:
    """Entries of a suite whose name contains a match of the pattern.

    Raises:
        ValueError: for a broken pattern, or when nothing matches.
    """
    try:
        entries = [entry for entry in SUITES[suite] if re.search(pattern, entry.name)]
    except re.error as error:
        raise ValueError(f"--only is {pattern!r}, not a regular expression: {error}") from error
    if not entries:
        raise ValueError(f"--only is {pattern!r}; no entry of suite {suite!r} matches (see --list)")
    return entries


def choose_device(name: str, suite: str) -> torch.device:
    """The device of a run; ``auto`` is CUDA for suite ``gpu`` and the CPU for the others.

    Raises:
        ValueError: when CUDA is asked for and there is none.
    """
    wanted = ("cuda" if suite == "gpu" else "cpu") if name == "auto" else name
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--suite {suite} --device {name} needs a CUDA GPU; torch {torch.__version__} sees none"
        )
    # With its index, as tensors have it.
    return torch.device("cuda", torch.cuda.current_device()) if wanted == "cuda" else CPU


def _run(
    entries: list[Entry],
    settings: Settings,
    folder: Path,
    document: dict[str, Any],
    device: torch.device,
) -> bool:
    """Add results to the document, and to its file, as they come; False when interrupted."""
    # The GPU's suite is measured in the GPU's way also where its tiny shapes run on a CPU.
    on_gpu = device.type == "cuda" or document["settings"]["suite"].startswith("gpu")
    bench = gpu_runner.Bench.on(device, settings) if on_gpu else None
    print(gpu_table.line(gpu_table.COLUMNS) if on_gpu else table.line(table.COLUMNS))
    try:
        for entry in entries:
            if bench is None:
                document["entries"].append(run_entry(entry, settings))
                lines = [table.line(row) for row in table.rows(document["entries"][-1])]
            else:
                document["entries"].append(gpu_runner.run_entry(entry, bench))
                lines = [gpu_table.line(row) for row in gpu_table.rows(document["entries"][-1])]
            print("\n".join(lines), flush=True)
            output.write(folder, document, indent=None)
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept")
        return False
    return True


def _finish(folder: Path, document: dict[str, Any], draw: bool) -> None:
    results = document["entries"]
    document["slower"] = [
        {"entry": result["name"], **item} for result in results for item in result["slower"]
    ]
    slower = table.slower_lines(results)
    print("\nWhere it is slower (a plain alternative beats ours by more than 3 %):")
    print("\n".join(f"  {line}" for line in slower) or "  nowhere")
    goals = [goal["met"] for result in results for goal in result["goals"]]
    print(f"Goals met: {sum(goals)} of {len(goals)}")
    output.write(folder, document)
    write_text(folder / "results.md", report.markdown(document))
    if draw:
        plots.draw(folder, results)
    print(f"Wrote {folder}")


def _print_header(document: dict[str, Any]) -> None:
    header = document["environment"]
    modules = header["served_by"].values()
    backends = ", ".join(sorted({".".join(module.split(".")[:3]) for module in modules}))
    print(f"{header['cpu']}, {header['cores']} cores, {header['threads']} threads")
    print(f"torch {header['torch']}, {header['blas']}; ours is served by {backends}")
    device = header.get("device", {})
    if device:
        print(f"{device['gpu']}, driver {device.get('driver')}, Triton {device['triton']}")
    print()


def _listed(entry: Entry) -> str:
    sizes = " ".join(f"{name}={value}" for name, value in entry.shape.items())
    modes, providers = ",".join(entry.modes), " ".join(entry.providers)
    return f"{entry.name:34} {entry.dtype}  {sizes}  [{modes}]  {providers}"


def _default_folder(suite: str) -> Path:
    return output.RESULTS / f"{suite}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", default="cpu", choices=sorted(SUITES))
    parser.add_argument("--only", default="", metavar="REGEX", help="entries whose name matches")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--repeats", type=int, default=Settings.repeats, help="rounds, at least 5")
    parser.add_argument(
        "--seconds", type=float, default=Settings.seconds, help="for each entry and mode"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: as PyTorch chooses")
    parser.add_argument(
        "--device",
        default="auto",
        choices=("cpu", "cuda", "auto"),
        help="auto: CUDA for suite gpu, the CPU for the others",
    )
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="busy neighbours")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--force", action="store_true", help="replace results in the folder")
    parser.add_argument("--list", action="store_true", help="print the entries and stop")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile peers")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--no-plots", action="store_true", help="needs no matplotlib")
    return parser


if __name__ == "__main__":
    sys.exit(main())
