"""How tokens find experts: one file an idea, all of them by name in ``registry.py``."""

from dit_models.routing.base import (
    LayerRouting,
    NoOptions,
    Router,
    RouterContext,
    Routing,
    make_options,
)
from dit_models.routing.registry import DEFAULTS, ROUTINGS

__all__ = [
    "DEFAULTS",
    "ROUTINGS",
    "LayerRouting",
    "NoOptions",
    "Router",
    "RouterContext",
    "Routing",
    "make_options",
]
