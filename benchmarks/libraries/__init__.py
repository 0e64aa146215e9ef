"""Other libraries behind this project's signatures, one file each, imported when they are used.

To add one: a file with its ``Library`` and adapters, its line in ``table.py``, and the names of its
providers in the entries. ``library.py`` has the signatures.
"""

from benchmarks.libraries.library import ExpertMLP, Experts, Library, Unavailable
from benchmarks.libraries.survey import survey
from benchmarks.libraries.table import EXPERTS, LIBRARIES

__all__ = [
    "EXPERTS",
    "LIBRARIES",
    "ExpertMLP",
    "Experts",
    "Library",
    "Unavailable",
    "survey",
]
