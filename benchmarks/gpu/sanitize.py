"""NVIDIA's compute-sanitizer over a few small tests of the CUDA kernels: a job for each tool.

What it finds is not what a test finds: an access outside memory that hits other memory, a read of
what nobody wrote, two threads that race and happen to agree, a barrier that some threads miss.
"""

import importlib.util
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import Job, Outcome

NAME = "compute-sanitizer"
SECONDS = 60.0  # for a tool
# By tool, whether PyTorch's own cache of memory would hide what it looks for.
TOOLS = {"memcheck": True, "racecheck": False, "initcheck": True, "synccheck": False}
NO_CACHE = "PYTORCH_NO_CUDA_MEMORY_CACHING"
USUAL_FOLDER = "/usr/local/cuda/bin"
WHERE = f"PATH, CUDA_HOME, beside nvcc, {USUAL_FOLDER}, pip's nvidia-cuda-sanitizer-api"

# The target is one process, whose exit status and CUDA errors the tests judge themselves. The tool
# waits for the import of PyTorch as long as it takes.
OPTIONS = (
    *("--target-processes", "application-only", "--launch-timeout", "0", "--print-limit", "20"),
    *("--check-exit-code", "no", "--report-api-errors", "no"),
)
TESTS = (
    *("-m", "pytest", "-m", "gpu", "-k", "small", "-x", "--tb=short", "-p", "no:cacheprovider"),
    "tests/test_gpu_cuda.py",
)

# The tool writes between the words of pytest, so that a line of its may start anywhere in one.
_LINE = re.compile(r"(?<!=)={9} +(\S.*)")
_REPORT = re.compile(r"Invalid __|Uninitialized |Race reported|hazard detected|Barrier error")
_SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): ([\d,]+) (?:errors?$|hazards? )")
_TESTS_RAN = re.compile(r"\d+ (?:passed|failed|errors?|skipped|deselected)[^=\n]* in [\d.]+s")
_PASSED = re.compile(r"(\d+) passed")
_NO_TESTS = 5  # status of pytest


def find_tool(environ: Mapping[str, str] = os.environ) -> str | None:
    """Path of compute-sanitizer; ``None`` where there is none."""
    for folders in (environ.get("PATH", ""), *_folders(environ)):
        found = shutil.which(NAME, path=folders) if folders else None
        if found is not None:
            return found
    return None


def _folders(environ: Mapping[str, str]) -> Iterator[str]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            yield str(Path(environ[name]) / "bin")
    words = shlex.split(environ.get("CUDACXX", "")) or ["nvcc"]
    nvcc = shutil.which(words[0], path=environ.get("PATH", ""))
    if nvcc is not None:
        yield str(Path(nvcc).resolve().parent)
    yield USUAL_FOLDER
    packages = importlib.util.find_spec("nvidia")
    for place in (packages.submodule_search_locations or ()) if packages is not None else ():
        yield from map(str, sorted(Path(place).glob("*/bin")))


def command(path: str, tool: str) -> list[str]:
    """The words that run one of ``TOOLS``."""
    return [path, "--tool", tool, *OPTIONS, sys.executable, *TESTS]


def by_hand(path: str, tool: str) -> str:
    """What to type for the same."""
    line = shlex.join(command(path, tool))
    return f"{NO_CACHE}=1 {line}" if TOOLS[tool] else line


def jobs(path: str, environ: Mapping[str, str] = os.environ) -> list[Job]:
    """A job for each tool."""
    without_cache = {**environ, NO_CACHE: "1"}
    return [
        Job(_job(tool), command(path, tool), without_cache if hidden else environ, SECONDS)
        for tool, hidden in TOOLS.items()
    ]


def _job(tool: str) -> str:
    return f"{NAME} {tool}"


def results(outcomes: Mapping[str, Outcome], path: str | None, why_not: str) -> dict[str, Any]:
    """Words, findings, seconds and whether it failed, of every tool.

    Args:
        outcomes: of ``jobs``, by name.
        path: of compute-sanitizer, ``None`` where it was not run.
        why_not: why it was not run.
    """
    found: dict[str, Any] = {}
    for tool in TOOLS:
        outcome = outcomes.get(_job(tool))
        line = "" if path is None else by_hand(path, tool)
        if outcome is None:
            words = f"not run: {why_not or 'the time was used up'}"
            found[_job(tool)] = _result(words, None, 0.0, False, line)
        else:
            found[_job(tool)] = _read(outcome, line)
    return found


def _result(
    words: str, findings: int | None, seconds: float, failed: bool, line: str
) -> dict[str, Any]:
    return {
        "words": words[:200],
        "findings": findings,
        "seconds": seconds,
        "failed": failed,
        "command": line,
    }


def _read(outcome: Outcome, line: str) -> dict[str, Any]:
    """What a run says.

    A finding is a failure, and so is a test that fails. A tool that does not work here, or is too
    slow, is not: it has said nothing about the kernels.
    """
    said = [text.strip() for text in _LINE.findall(outcome.output)]
    said = [text for text in said if text != NAME.upper()]
    counts = [found[1] for text in said if (found := _SUMMARY.search(text)) is not None]
    findings = sum(int(count.replace(",", "")) for count in counts) if counts else None
    reports = [number for number, text in enumerate(said) if _REPORT.search(text)]
    ran = _TESTS_RAN.search(outcome.output)
    tests = ran[0] if ran is not None else outcome.last_line
    failed = bool(findings or reports)
    if failed:
        first = reports[0] if reports else 0
        number = "findings" if findings is None else f"{findings} findings"
        words = f"{number}, the first: {' '.join(said[first : first + 2])}"
    elif outcome.status is None:
        words = f"no result: stopped after {outcome.seconds:.0f} s"
    elif findings is None:
        words = f"no result, status {outcome.status}: {said[0] if said else outcome.last_line}"
    elif outcome.status not in (0, _NO_TESTS):
        words, failed = f"no findings, but tests failed: {tests}", True
    elif (passed := _PASSED.search(tests)) is None:
        words = f"no result, no test ran: {tests}"
    else:
        words = f"no findings in {passed[1]} tests"
    return _result(words, findings, outcome.seconds, failed, line)
