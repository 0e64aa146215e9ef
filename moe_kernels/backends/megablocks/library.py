"""megablocks' grouped product: the function ``gmm`` of grouped_gemm, and whether it is here."""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

INSTALL = "pip install --no-deps --no-build-isolation grouped_gemm==0.3.0"
DOCS = "docs/megablocks.md"


@functools.cache  # an import that fails takes longer than a product
def find_gmm() -> Callable[..., Tensor]:
    """The function ``gmm(a, b, batch_sizes, trans_a, trans_b, c)``.

    Raises:
        ImportError: it is not here or cannot be loaded; says why and how to install it.
    """
    try:
        backend: Any = importlib.import_module("grouped_gemm.backend")
    except (Exception, SystemExit) as error:  # built for another PyTorch, it raises many types
        backend = _of_hugging_face()
        if backend is None:
            raise ImportError(_why(error)) from error
    gmm: Callable[..., Tensor] = backend.gmm
    return gmm


def _of_hugging_face() -> Any:
    """The one inside kernels-community/megablocks, when somebody has loaded that."""
    return getattr(sys.modules.get("megablocks"), "gg_backend", None)


def _why(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "grouped_gemm":
        return f"grouped_gemm, megablocks' grouped product, is not installed: {INSTALL} ({DOCS})"
    said = (str(error).strip().splitlines() or [""])[0]
    return (
        f"grouped_gemm, megablocks' grouped product, fails when imported ({type(error).__name__}: "
        f"{said}): build it again for this PyTorch, {INSTALL} ({DOCS})"
    )
