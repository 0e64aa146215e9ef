"""Everything that only a GPU can say: ``make gpu-check`` or ``python -m benchmarks.gpu_check``.

Runs the tests that are marked ``gpu``, some of them under compute-sanitizer as well, then suite
``gpu`` in order of importance while the time lasts. Results go to
``benchmarks/results/<gpu>-<date>.json``, with a report and plots beside it. Exits with 1 when a
test failed, compute-sanitizer found something or ours is wrong somewhere; a missed speed goal is
reported only.
"""

import argparse
import datetime
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import output, plots, report
from benchmarks.entry import CPU, Entry
from benchmarks.environment import describe
from benchmarks.gpu import first_steps, sanitize, summary, supervise
from benchmarks.gpu.hardware import QUERY, query, slug
from benchmarks.libraries import survey
from benchmarks.runner import failed
from benchmarks.suites import select
from dit_models.atomic import write_text
from moe_kernels.backends import BACKENDS

SECONDS = 440.0
# Tests and first calls get at most this share of the time; what they leave is the suite's.
FIRST_SHARE = 0.45
FINISH_SECONDS = 15.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 2 where there is no GPU, 1 when something is wrong."""
    options = _parser().parse_args(arguments)
    began = time.monotonic()
    refusal = None if options.rehearse else why_not()
    if refusal is not None:
        print(f"gpu-check: {refusal}", file=sys.stderr)
        return 2
    try:
        entries = select("gpu-smoke" if options.rehearse else "gpu", options.only)
    except ValueError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    device = CPU if options.rehearse else torch.device("cuda", torch.cuda.current_device())
    document = _document(sys.argv[1:] if arguments is None else arguments, device, options)
    header = document["environment"]
    print(f"{header.get('device', {}).get('gpu', header['cpu'])}, torch {header['torch']}")
    print(f"ours: {', '.join(f'{op} {module}' for op, module in header['served_by'].items())}")
    print(f"backend cuda: {header['cuda_kernels']}\n")
    path = _path(options.out or _folder(options.rehearse), document)
    _first_steps(entries, document, options)
    left = options.seconds - FINISH_SECONDS - (time.monotonic() - began)
    _suite(entries, document, options, left)
    if device.type == "cuda":
        document["environment"]["device"]["after"] = query(device, QUERY)
    document["seconds"] = time.monotonic() - began
    _write(path, document, draw=not options.no_plots)
    return _finish(path, document)


def why_not() -> str | None:
    """Why nothing can be measured here; ``None`` when it can."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "is built without CUDA" if built is None else f"(CUDA {built}) sees no GPU"
        return f"needs a CUDA GPU, and torch {torch.__version__} {why}. Nothing was run."
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: kernels would run in the interpreter. Unset it."
    if os.environ.get("MOE_KERNELS_SIMULATED_GPU") == "1":
        return "MOE_KERNELS_SIMULATED_GPU is set: kernels would run on a simulated GPU. Unset it."
    return None


def why_not_sanitized(options: Any, path: str | None) -> str:
    """Why compute-sanitizer is not run; empty when it is."""
    if options.rehearse:
        return "a rehearsal has no GPU"
    if options.skip_tests or options.skip_sanitizer:
        return "left out on request"
    reason = BACKENDS["cuda"].why_not("expert_choice", "cuda")
    if reason is not None:
        return f"backend cuda {reason}"
    return "" if path is not None else f"{sanitize.NAME} was not found ({sanitize.WHERE})"


def _cuda_kernels(device: torch.device) -> str:
    """What there is of the CUDA C++ kernels; nothing of a run depends on them."""
    backend = BACKENDS["cuda"]
    reason = backend.why_not("expert_choice", device.type)
    return backend.describe() if reason is None else f"{reason}; its tests are skipped"


def _document(arguments: Sequence[str], device: torch.device, options: Any) -> dict[str, Any]:
    environment = describe(arguments, device, module="benchmarks.gpu_check")
    return {
        "schema": 2,
        "libraries": survey(device),
        "environment": {**environment, "cuda_kernels": _cuda_kernels(device)},
        "settings": {"suite": "gpu", "seconds": options.seconds, "only": options.only},
        "complete": False,
        "tests": {},
        "sanitizer": {},
        "first_call": {},
        "rates": {},
        "entries": [],
        "not_measured": [],
    }


def _folder(rehearse: bool) -> Path:
    """A rehearsal's figures mean nothing, so they are not put beside those of a GPU."""
    return Path(tempfile.mkdtemp(prefix="gpu-check-")) if rehearse else output.RESULTS


def _path(folder: Path, document: dict[str, Any]) -> Path:
    """``<gpu>-<date>.json``; a second run of a day has its time in the name, too."""
    name = slug(document["environment"].get("device", {}).get("gpu", "rehearsal"))
    now = datetime.datetime.now()
    path = folder / f"{name}-{now:%Y%m%d}.json"
    return folder / f"{name}-{now:%Y%m%d-%H%M%S}.json" if path.exists() else path


def _first_steps(entries: list[Entry], document: dict[str, Any], options: Any) -> None:
    """Tests and first calls, side by side: they are bound by compilers, not by the GPU."""
    path = sanitize.find_tool()
    why_not = why_not_sanitized(options, path)
    steps = first_steps.FirstSteps(
        tests=not options.skip_tests,
        first_calls=not options.skip_first_calls,
        tiny=options.rehearse,
        sanitizer=None if why_not else path,
    )
    outcomes = steps.run(entries, seconds=FIRST_SHARE * options.seconds)
    document["tests"] = first_steps.test_results(outcomes)
    document["sanitizer"] = sanitize.results(outcomes, None if why_not else path, why_not)
    document["first_call"] = first_steps.first_calls(outcomes)
    checks = {**document["tests"], **document["sanitizer"]}
    for name, found in checks.items():
        print(f"{name}: {found['words']} ({found['seconds']:.0f} s)")
        if found.get("command"):
            print(f"  by hand: {found['command']}")
    for name, found in checks.items():
        if found["failed"]:
            print(f"\n{name}\n{outcomes[name].output.strip()}\n")


def _suite(entries: list[Entry], document: dict[str, Any], options: Any, seconds: float) -> None:
    arguments = ["--suite", "gpu-smoke", "--device", "cpu"] if options.rehearse else []
    if options.rehearse:
        arguments += ["--no-compile", "--repeats", "5", "--rounds-seconds", "0"]

    def said(result: dict[str, Any]) -> None:
        print("\n".join(list(summary.lines([result]))[1:]), flush=True)

    print(f"\n{next(summary.lines([]))}")
    names = [entry.name for entry in entries]
    measured = supervise.run_entries(names, arguments, max(seconds, 0.0), report=said)
    order = {name: number for number, name in enumerate(names)}
    document["entries"] = sorted(measured.results, key=lambda result: order[result["name"]])
    document["not_measured"] = measured.not_measured
    document["rates"] = measured.rates
    document["settings"] |= measured.rates
    document["complete"] = not measured.not_measured


def _write(path: Path, document: dict[str, Any], draw: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, output.text(document))
    prefix = f"{path.stem}-"
    write_text(path.with_suffix(".md"), report.markdown(document))
    if draw and importlib.util.find_spec("matplotlib") is not None:
        pictures = plots.draw(path.parent, document, prefix=prefix)
        write_text(path.with_suffix(".md"), report.markdown(document, pictures, prefix))
    elif draw:
        print("no plots: matplotlib is not installed")


def _finish(path: Path, document: dict[str, Any]) -> int:
    """The short table, last, and the exit status."""
    print("\n" + "\n".join(summary.lines(document["entries"])))
    for item in document["not_measured"]:
        print(f"not measured: {item['name']}: {item['reason']}")
    for name, found in document["first_call"].items():
        words = ", ".join(f"{key} {value:.1f}" for key, value in found.items())
        print(f"first call, empty caches: {name}: {words}")
    for name, found in document["sanitizer"].items():
        print(f"{name}: {found['words']}")
    met, number = summary.goals_met(document["entries"])
    wrong = [result["name"] for result in document["entries"] if failed(result)]
    tests = [name for name, found in document["tests"].items() if found["failed"]]
    sanitized = [name for name, found in document["sanitizer"].items() if found["failed"]]
    crashed = [
        item["name"] for item in document["not_measured"] if item["reason"] != supervise.OUT_OF_TIME
    ]
    print(f"goals met: {met} of {number}; {len(document['entries'])} entries")
    failures = {
        "tests failed": tests,
        "found something": sanitized,
        "ours is wrong": wrong,
        "broken": crashed,
    }
    for words, names in failures.items():
        if names:
            print(f"FAIL: {words}: {', '.join(names)}")
    print(f"wrote {path} in {document['seconds']:.0f} s")
    return 1 if any(failures.values()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--only", default="", metavar="REGEX", help="entries whose name matches")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--skip-sanitizer", action="store_true", help="no compute-sanitizer")
    parser.add_argument("--skip-first-calls", action="store_true", help="no cold and warm starts")
    parser.add_argument("--no-plots", action="store_true", help="write no pictures")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="every step at tiny shapes on the CPU; says nothing about a GPU",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
