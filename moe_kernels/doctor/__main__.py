"""``python -m moe_kernels.doctor``: exits with 0 when all that should work here does, else 1."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from moe_kernels.doctor.diagnosis import diagnose


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_kernels.doctor",
        description="Prints what this machine has, which backends work, and what to do about "
        "the rest. Exits with 0 when all that should work here does, else with 1.",
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    options = parser.parse_args(arguments)
    diagnosis = diagnose()
    text = json.dumps(diagnosis.to_dict(), indent=2) if options.json else str(diagnosis)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has what it wanted: ``| head``
        # Python flushes once more at its exit; there that has to go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if diagnosis.ok else 1


if __name__ == "__main__":
    sys.exit(main())
