"""Measure this machine: ``python -m benchmarks.run``, in less than ten minutes.

Without arguments, what tells most about ours beside its alternatives; with a CUDA GPU, on both.
Every provider is checked against fp64 before it is timed; all providers of an entry are timed in
turns in one process. Results, a report and pictures go to ``benchmarks/runs/<suite>-<time>/``.
"""

import argparse
import datetime
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare, csv_table, digest, estimate, limits, output, plots, report, table
from benchmarks.budget import Budget, OutOfTime, at_most
from benchmarks.busy import busy
from benchmarks.check import first_line
from benchmarks.entry import CPU, MODES, Entry
from benchmarks.environment import describe
from benchmarks.gpu import hardware
from benchmarks.libraries import survey
from benchmarks.parts import PROFILED, PROFILED_ON_GPU, Part
from benchmarks.registry import find_entry
from benchmarks.runner import Settings, failed
from benchmarks.session import Session
from benchmarks.suites import STEPS, Step, steps
from benchmarks.timing import MIN_ROUNDS
from dit_models.atomic import write_text

# Of the default suite.
DEFAULT_MINUTES = 10.0
DEFAULT_SECONDS = 0.6
# A GPU's share of its time where the CPU is measured, too.
GPU_SHARE = 0.6


def main(arguments: Sequence[str] | None = None, began: float | None = None) -> int:
    """Run the command line; 1 when ours is wrong, something broke, or after Ctrl-C.

    Args:
        arguments: of the command line.
        began: when its time began, of ``time.monotonic``; by default, now.
    """
    began = time.monotonic() if began is None else began
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.compare:
            print(compare.text(*(output.read_run(path) for path in options.compare)))
            return 0
        _check_numbers(options)
        settings = _settings(options)
        if options.list:
            print("\n".join(_listed(step, settings) for step in _steps(options, CPU)))
            return 0
        plans = _plans(options)
        folder = output.claim(options.out or _default_folder(options.suite), options.force)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.threads:
        torch.set_num_threads(options.threads)
    words = sys.argv[1:] if arguments is None else arguments
    seconds = _seconds(options)
    document = new_document(
        words,
        settings,
        list(plans),
        suite=options.suite,
        only=options.only,
        minutes=None if seconds is None else seconds / 60,
        busy=options.busy,
    )
    _print_header(document, _missing(draw=not options.no_plots))
    # The profiler would say on the terminal when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    session = Session(document, folder, settings, Budget(seconds, began=began))
    with termination_as_interrupt():
        try:
            with busy(options.busy):
                _measure(session, plans, options)
            document["complete"] = True
        except KeyboardInterrupt:
            print("interrupted; what was measured is kept")
        drawn = _finish(session, draw=not options.no_plots)
    return _status(session) if drawn else 1


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM like Ctrl-C in the block: results are kept and processes on a GPU are ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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


def choose_devices(name: str, suite: str) -> list[torch.device]:
    """One device, or for suite ``default`` a GPU and then the CPU where there is one.

    Raises:
        ValueError: when CUDA is asked for and there is none.
    """
    if (name, suite) == ("auto", "default") and torch.cuda.is_available():
        return [choose_device("cuda", suite), CPU]
    return [choose_device(name, suite)]


def new_document(
    arguments: Sequence[str], settings: Settings, devices: list[torch.device], **further: Any
) -> dict[str, Any]:
    """The document of a run in which nothing was measured yet.

    Args:
        arguments: of the command.
        settings: how long and what to measure.
        devices: that are measured.
        further: settings beside those.
    """
    gpu = next((device for device in devices if device.type == "cuda"), None)
    environment = describe(arguments, gpu or CPU)
    if gpu is not None and CPU in devices:
        served = describe(arguments, CPU)["served_by"]
        environment |= {"served_by": served, "served_by_cuda": environment["served_by"]}
    document: dict[str, Any] = {
        "schema": 2,
        "environment": environment,
        "settings": {**further, **asdict(settings)},
        "complete": False,
        "seconds": 0.0,
        "libraries": survey(gpu or CPU),
        "rates": limits.rates() if CPU in devices else {},
    }
    return (
        document
        | {name: [] for name in ("entries", "compile", "models", "stages")}
        | {"not_measured": []}
    )


def _plans(options: argparse.Namespace) -> dict[torch.device, list[Step]]:
    """What is measured on each device, in this order.

    Raises:
        ValueError: for an impossible device, or when nothing is left to measure.
    """
    plans: dict[torch.device, list[Step]] = {}
    devices = choose_devices(options.device, options.suite)
    for device in devices:
        try:
            plans[device] = _steps(options, device)
        except ValueError:
            if device == devices[-1] and not plans:
                raise
    return plans


def _steps(options: argparse.Namespace, device: torch.device) -> list[Step]:
    on_gpu = device.type == "cuda"
    if options.profile and options.suite == "default" and not options.only:
        names = PROFILED_ON_GPU if on_gpu else tuple(PROFILED)
        return [replace(find_entry(name), memory=()) for name in names]
    suite = "gpu" if on_gpu and options.suite == "default" else options.suite
    return steps(suite, options.only)


def _check_numbers(options: argparse.Namespace) -> None:
    """Raise ``ValueError`` for a number that means nothing."""
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise ValueError(f"--minutes is {options.minutes:g}; expected more than 0")
    if options.seconds is not None and not 0 <= options.seconds < math.inf:
        raise ValueError(f"--seconds is {options.seconds:g}; expected 0 or more")
    if options.repeats < MIN_ROUNDS:
        raise ValueError(f"--repeats is {options.repeats}; expected at least {MIN_ROUNDS}")
    for name in ("threads", "busy"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name} is {getattr(options, name)}; expected 0 or more")


def _settings(options: argparse.Namespace) -> Settings:
    seconds = DEFAULT_SECONDS if options.suite == "default" else Settings.seconds
    return Settings(
        repeats=options.repeats,
        seconds=seconds if options.seconds is None else options.seconds,
        modes=tuple(options.modes),
        compiled=not options.no_compile and _compiler() is not None,
        memory=not options.no_memory,
    )


def _seconds(options: argparse.Namespace) -> float | None:
    """Of the whole run; ``None`` for as long as it takes."""
    if options.minutes is not None:
        return float(60 * options.minutes)
    return 60 * DEFAULT_MINUTES if options.suite == "default" else None


def _measure(
    session: Session, plans: dict[torch.device, list[Step]], options: argparse.Namespace
) -> None:
    for device, plan in plans.items():
        entries = [step for step in plan if isinstance(step, Entry)]
        if device.type == "cuda":
            suite = "gpu" if options.suite == "default" else options.suite
            share = GPU_SHARE if len(plans) > 1 else 1.0
            session.on_gpu(plan, suite, share * session.budget.left)
            after = hardware.query(device, hardware.QUERY)
            session.document["environment"]["device"]["after"] = after
        elif options.suite.startswith("gpu"):
            session.rehearse(entries)
        else:
            session.on_cpu(plan)
        if options.profile:
            session.profile(entries, device)


def _finish(session: Session, draw: bool) -> bool:
    """Tables, then ``results.json``, ``.csv`` and ``.md``, then pictures, which take longest.

    Returns:
        Whether it was not interrupted.
    """
    document, folder = session.document, session.folder
    results = document["entries"]
    document["slower"] = [
        {"entry": result["name"], **item} for result in results for item in result["slower"]
    ]
    slower = table.slower_lines(results)
    print("\nWhere it is slower (a plain alternative beats ours by more than 3 %):")
    print("\n".join(f"  {line}" for line in slower) or "  nowhere")
    goals = [goal["met"] for result in results for goal in result["goals"]]
    print(f"Goals met: {sum(goals)} of {len(goals)}")
    if document["not_measured"]:
        print(f"Left out or cut short, for the reasons above: {len(document['not_measured'])}")
    document["seconds"] = session.budget.spent
    output.write(folder, document)
    write_text(folder / "results.csv", csv_table.text(document))
    write_text(folder / "results.md", report.markdown(document))
    if draw and find_spec("matplotlib") is not None:
        try:
            with at_most(session.budget.left_in_all):
                pictures = plots.draw(folder, document)
                write_text(folder / "results.md", report.markdown(document, pictures))
        except OutOfTime:
            print("No time was left for all pictures.")
        except KeyboardInterrupt:
            print("interrupted; not all pictures were drawn")
            return False
        except ImportError as error:
            print(f"No pictures: {first_line(error)}")
        except Exception as error:  # the results are written
            print(f"Not all pictures were drawn: {first_line(error)}")
            session.broken.append("the pictures")
    print(f"Wrote {folder} in {session.budget.spent:.0f} s")
    return True


def _status(session: Session) -> int:
    wrong = [result["name"] for result in session.document["entries"] if failed(result)]
    failures = {"ours is wrong in": wrong, "an error ended": session.broken}
    for words, names in failures.items():
        if names:
            print(f"FAIL: {words} {', '.join(names)}")
    return 1 if any(failures.values()) or not session.document["complete"] else 0


def _print_header(document: dict[str, Any], missing: list[str]) -> None:
    header = document["environment"]
    modules = header["served_by"].values()
    backends = ", ".join(sorted({".".join(module.split(".")[:3]) for module in modules}))
    commit = f"{(header['commit'] or 'unknown')[:12]}{' with changes' if header['dirty'] else ''}"
    print(f"{header['date']}, commit {commit}")
    print(f"{header['cpu']}, {header['cores']} cores, {header['threads']} threads")
    print(f"torch {header['torch']}, {header['blas']}; ours is served by {backends}")
    device = header.get("device", {})
    if device:
        print(f"{device['gpu']}, driver {device.get('driver')}, Triton {device['triton']}")
    for warning in digest.warnings({**document, "complete": True}):
        print(f"Warning: {warning}")
    used = [f"{item['name']} {item['version']}" for item in _libraries(document, "used")]
    print(f"Libraries beside ours: {', '.join(used) or 'none'}")
    for item in (*_libraries(document, "importable"), *_libraries(document, "skipped")):
        print(f"  without {item['name']}: {item['reason']}")
    print("\n".join(missing))


def _libraries(document: dict[str, Any], status: str) -> list[dict[str, Any]]:
    return [item for item in document["libraries"] if item["status"] == status]


def _missing(draw: bool) -> list[str]:
    """What this machine lacks, a line each."""
    found = []
    if _compiler() is None:
        found.append("No C++ compiler was found, so there are no torch.compile peers.")
    if draw and find_spec("matplotlib") is None:
        found.append('No pictures without matplotlib: pip install "dit-moe-kernels[bench]"')
    return found


def _compiler() -> str | None:
    """The C++ compiler that torch.compile would find, about."""
    names = (os.environ.get("CXX", "g++"), "c++", "clang++", "cl")
    return next(filter(None, map(shutil.which, names)), None)


def _listed(step: Step, settings: Settings) -> str:
    if isinstance(step, Part):
        return f"{step.name:38} about {step.seconds:4.0f} s  {step.summary}"
    sizes = " ".join(f"{name}={value}" for name, value in step.shape.items())
    modes, providers = ",".join(step.modes), " ".join(step.providers)
    seconds = estimate.entry_seconds(step, settings) + estimate.memory_seconds(step, settings)
    return f"{step.name:38} about {seconds:4.0f} s  {step.dtype}  {sizes}  [{modes}]  {providers}"


def _default_folder(suite: str) -> Path:
    return output.RUNS / f"{suite}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", default="default", metavar="NAME", help=", ".join(STEPS))
    add("--only", default="", metavar="REGEX", help="entries and parts whose name matches")
    add("--minutes", type=float, help="end before it (10 for suite default, else no limit)")
    add("--modes", nargs="+", default=MODES, choices=MODES)
    add("--repeats", type=int, default=Settings.repeats, help="rounds, at least 5")
    add("--seconds", type=float, help="for each entry and mode (0.6 for suite default, else 3)")
    add("--threads", type=int, default=0, help="0: as PyTorch chooses")
    add(
        "--device",
        default="auto",
        choices=("cpu", "cuda", "auto"),
        help="auto: CUDA for suite gpu, both for default, the CPU for the others",
    )
    add("--profile", action="store_true", help="also write chrome traces; by default of two layers")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two results; measures nothing")
    add("--busy", type=int, default=0, metavar="N", help="busy neighbours")
    add("--out", type=Path, help="folder for the results instead of that")
    add("--force", action="store_true", help="replace results in the folder")
    add("--list", action="store_true", help="print the entries and stop")
    add("--no-compile", action="store_true", help="leave out torch.compile peers")
    add("--no-memory", action="store_true", help="leave out peak memory")
    add("--no-plots", action="store_true", help="draw no pictures")
    return parser


if __name__ == "__main__":
    # Imports are part of the run; they take about the time that this process has computed.
    sys.exit(main(began=time.monotonic() - time.process_time()))
