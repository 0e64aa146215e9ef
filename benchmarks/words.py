"""How figures are written, and Markdown tables."""

import re
from collections.abc import Iterable, Iterator, Sequence


def duration(seconds: float) -> str:
    """Three digits, in microseconds, milliseconds or seconds."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{digits(seconds * factor)} {unit}"
    return f"{digits(seconds)} s"


def size(count: float) -> str:
    """Bytes in MiB, or in KiB below a tenth of that."""
    if count < 2**20 / 10:
        return f"{count / 2**10:.1f} KiB"
    return f"{digits(count / 2**20)} MiB"


def rate(per_second: float, unit: str) -> str:
    """So many units a second, in G or T."""
    if per_second >= 1e12:
        return f"{digits(per_second * 1e-12)} T{unit}/s"
    return f"{digits(per_second * 1e-9)} G{unit}/s"


def digits(value: float) -> str:
    """Three digits below 1000; whole numbers above."""
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def ratio(value: float) -> str:
    """``1.23x``."""
    return f"{digits(value)}x"


def spread(low: float, high: float) -> str:
    """Quartiles: ``1.20-1.30``."""
    return f"{digits(low)}-{digits(high)}"


def share(value: float) -> str:
    """A part of the whole in percent, with a digit after the point below 10 %."""
    return f"{value:.0%}" if value >= 0.0995 else f"{value:.1%}"


def cell(text: str) -> str:
    """Text that a table's cell can hold, and in which ``<x>`` is no tag of HTML."""
    text = re.sub(r"<(?=[A-Za-z/!])", r"\\<", text)
    return text.replace("|", "\\|").replace("\n", " ").strip()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table; nothing without rows."""
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    if lines:
        yield "| " + " | ".join(columns) + " |"
        yield "|" + "---|" * len(columns)
        yield from lines


def listed(names: Iterable[str]) -> str:
    """``a, b, c``."""
    return ", ".join(names)
