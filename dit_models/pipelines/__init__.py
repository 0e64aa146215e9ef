"""Pipelines in the shape of diffusers': ``DiTMoEPipeline`` and ``ECDiTPipeline``.

They are imported when first used, because they need diffusers.
"""

import importlib
from typing import Any

_HOMES = {
    "DiTMoEPipeline": "dit_models.pipelines.dit_moe",
    "ECDiTPipeline": "dit_models.pipelines.ec_dit",
    "DiTTransformer": "dit_models.pipelines.components",
    "CaptionEncoder": "dit_models.pipelines.components",
}

__all__ = ["CaptionEncoder", "DiTMoEPipeline", "DiTTransformer", "ECDiTPipeline"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
