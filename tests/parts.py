"""The two parts of the suite: what shares the machine, and what has to have it alone.

``python -m tests`` (``make test``) runs the first in several processes and then the second in one.
A new test belongs to the first unless it is listed here.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Files, or tests of a file (``file::name``, all their parameters), and why they run alone.
CHECK = "tests/benchmarks/test_gpu_check.py"
ALONE = {
    "tests/benchmarks/test_regression.py": "compares times",
    f"{CHECK}::test_jobs_run_side_by_side_and_are_stopped_in_time": "programs have three seconds",
    f"{CHECK}::test_a_job_is_stopped_with_what_it_started": "programs have three seconds",
    f"{CHECK}::test_a_worker_that_hangs_is_stopped": "a program has 1.5 s to start",
    "tests/benchmarks/test_gpu_timing.py::test_a_time_limit_interrupts_and_leaves_nothing_behind": (
        "a block has 50 ms"
    ),
}

# Of minutes: begun first, so that none of them is left when all the others are done.
LONG = ("tests/test_triton_compile.py",)

PARTS = ("shared", "alone")
# Processes that run tests now, this one included.
RUNNING = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
MOST_WORKERS = 8  # a process with PyTorch and its share of the tests takes one or two GB


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def workers() -> int:
    """Processes for the shared part."""
    return min(cores(), MOST_WORKERS)


def share_of_cores(parts: int) -> int:
    """Cores for a process or test when ``parts`` like it share them."""
    return max(1, cores() // parts)


def part_of(test: str) -> str:
    """The part of a test, named as pytest does: ``tests/a/test_b.py::test_c[parameters]``."""
    file, _, name = test.partition("::")
    function = f"{file}::{name.partition('[')[0]}"
    return "alone" if file in ALONE or function in ALONE else "shared"


def may_hold(file: str, part: str) -> bool:
    """Whether a file has tests of the part."""
    if part == "shared":
        return file not in ALONE
    return any(entry.partition("::")[0] == file for entry in ALONE)
