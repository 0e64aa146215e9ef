"""Print which libraries the benchmarks use here: ``python -m benchmarks.libraries``."""

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.libraries import survey


def main(arguments: Sequence[str] | None = None) -> int:
    """Print name, version, whether it is used or why not, and how to install it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.libraries", description=__doc__)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found, choices=("cpu", "cuda"))
    device = parser.parse_args(arguments).device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda needs a CUDA GPU; torch {torch.__version__} sees none")
    records = survey(device)
    width = max(len(record["name"]) for record in records)
    for record in records:
        version, reason = record["version"] or "-", record["reason"] or ", ".join(record["stages"])
        print(f"{record['name']:{width}}  {version:12}  {record['status']:10}  {reason}")
    print()
    for record in records:
        for command in record["install"]:
            print(f"{record['name']:{width}}  {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
