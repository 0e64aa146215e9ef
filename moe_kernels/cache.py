"""Where the package keeps files between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``MOE_KERNELS_CACHE``, else ``dit-moe-kernels`` in the user's cache folder."""
    if given := os.environ.get("MOE_KERNELS_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dit-moe-kernels"
