"""Every random state that a run depends on, as plain data that ``weights_only`` loading accepts."""

import random
from typing import Any

import numpy as np
import torch


def get_rng_state(generator: torch.Generator) -> dict[str, Any]:
    """States of Python, NumPy, torch (CPU and every GPU) and the run's own generator."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss,
                  gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "generator": generator.get_state(),
    }  # fmt: skip


def set_rng_state(state: dict[str, Any], generator: torch.Generator) -> None:
    """Restore what ``get_rng_state`` returned."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(  # noqa: NPY002 - the global state is what is being restored
        (kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss)
    )
    torch.set_rng_state(state["torch"])
    # Training draws from the run's CPU generator alone; on another number of GPUs their own
    # states have nobody to go to.
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    generator.set_state(state["generator"])
