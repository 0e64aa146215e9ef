"""Pictures of a document, one file a kind; what the document does not hold is not drawn.

``<group>`` other/ours of a group, or time along a series; ``memory``; ``roofline``;
``stages-<entry>``; ``models``; ``compile``. Pictures of a GPU end with ``-cuda``.
"""

from pathlib import Path
from typing import Any

from dit_models.extras import require


def draw(folder: Path, document: dict[str, Any], prefix: str = "") -> list[Path]:
    """Write every picture of a document as ``<prefix><kind>.png``; the paths, in order.

    Raises:
        ImportError: without matplotlib; names the extra that installs it.
    """
    require("matplotlib", extra="bench")
    from benchmarks.plots import first_calls, memory, models, ratios, roofline, series, stages

    kinds = (ratios, series, memory, roofline, stages, models, first_calls)
    return [path for kind in kinds for path in kind.draw(folder, document, prefix)]
