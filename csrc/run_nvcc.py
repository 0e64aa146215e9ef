"""Call nvcc and keep what ptxas says of the kernels: ``run_nvcc.py KEPT nvcc ...``.

Registers and spills go into the file KEPT, errors and warnings to the screen. No file is left by a
call that fails. nvcc gets its share of the processors, or of ``MAX_JOBS``, for the architectures;
among the words of the call it would make ninja compile again whenever that number changes.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

# "ptxas info    : Used 8 registers", and indented below "Function properties" the stack's size.
REMARK = re.compile(r"ptxas info\s+:|\s+\d+ bytes stack frame,")


# Calls that run at once. One leaves processors idle while nvcc calls the C++ compiler; with more
# the longest file would end up alone.
NVCC_AT_ONCE = 2


def threads() -> int:
    """Architectures to compile for at once."""
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    return max(1, jobs // NVCC_AT_ONCE)


def main(kept: Path, command: list[str]) -> int:
    """Return the exit status of nvcc."""
    kept.unlink(missing_ok=True)
    result = subprocess.run(
        [*command, "--threads", str(threads())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    lines = result.stdout.splitlines(keepends=True)
    sys.stdout.writelines(line for line in lines if not REMARK.match(line))
    if result.returncode == 0:
        kept.write_text("".join(line for line in lines if REMARK.match(line)), encoding="utf-8")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
