"""Optional dependencies: imported when first used, with an error that names the extra."""

import importlib
from types import ModuleType


def require(module: str, *, extra: str) -> ModuleType:
    """Import ``module``, which the optional dependency group ``extra`` installs.

    Raises:
        ImportError: names the missing module and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed here and cannot be imported ({error}). "
            f'Install it with: pip install "dit-moe-kernels[{extra}]"'
        ) from error
