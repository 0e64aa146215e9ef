"""What the kernels need of Triton and of the GPU."""

import torch
import triton

OLDEST_TRITON = (3, 5)
OLDEST_CAPABILITY = (8, 0)


def why_not() -> str | None:
    """Why the kernels cannot run here; ``None`` when they can, or when there is no GPU to ask."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"Triton 3.5 or newer is needed, this is {triton.__version__}"
    if torch.version.hip or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name()
        found = ".".join(map(str, capability))
        return f"compute capability 8.0 or newer is needed, {name} has {found}"
    return None


def check() -> None:
    """Raise ``ImportError`` with the reason, which the backends table then shows."""
    if (reason := why_not()) is not None:
        raise ImportError(reason)
