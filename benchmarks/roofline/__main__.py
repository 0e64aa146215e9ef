"""Print the counted roofline and write it: ``python -m benchmarks.roofline``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.output import RESULTS
from benchmarks.roofline.report import markdown, text
from benchmarks.roofline.shapes import H100
from dit_models.atomic import write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "roofline.md")
    options = parser.parse_args(arguments)
    print("\n".join(text(H100)))
    write_text(options.out, markdown(H100))
    print(f"\nWrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
