"""``benchmarks`` is not installed: it is imported from the repository's root."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:  # `python -m pytest` in the root has it, plain `pytest` has not
    sys.path.insert(0, ROOT)
