"""``python -m tests [words for pytest]``: the suite, in several processes where that is possible.

First what shares the machine, a process a core, then what needs it alone (``parts.py``). Fails when
one of them fails. Where the words name single files only, one process runs all of them at once:
starting more would take longer.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

PASSED, FAILED = pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED
NONE = pytest.ExitCode.NO_TESTS_COLLECTED


def main(words: Sequence[str]) -> int:
    """Run the parts that the words ask for; return pytest's exit status."""
    if names_files_only(words):
        return run(words)
    # Neighbours of the listing share fixtures and what was compiled: they stay together.
    beside = ["-n", "auto", "--dist", "worksteal", "--benchmark-disable"]
    shared = timed("shared", [*beside, "--part", "shared", *words])
    if shared not in (PASSED, FAILED, NONE):  # interrupted, also by -x, or misunderstood
        return shared
    alone = timed("alone", ["--part", "alone", *words])
    return combined(shared, alone)


def names_files_only(words: Sequence[str]) -> bool:
    """Whether the words name files or tests of them, and no folder."""
    paths = [Path(word.partition("::")[0]) for word in words]
    paths = [path for path in paths if path.is_dir() or (path.suffix == ".py" and path.exists())]
    return bool(paths) and not any(path.is_dir() for path in paths)


def combined(shared: int, alone: int) -> int:
    """The status of both parts; that one of them has no tests is no failure."""
    if NONE in (shared, alone):
        return alone if shared == NONE else shared
    return shared or alone


def timed(part: str, words: Sequence[str]) -> int:
    """Run a part and print how long it took."""
    start = time.monotonic()
    status = run(words)
    print(f"{part} part: {time.monotonic() - start:.0f} s", flush=True)
    return status


def run(words: Sequence[str]) -> int:
    """Run pytest in a process of its own; return its exit status."""
    process = subprocess.Popen([sys.executable, "-m", "pytest", *words])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # pytest gets it, too, and ends with a summary
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
