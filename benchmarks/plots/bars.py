"""Horizontal bars under headings: one heading for each entry, one bar for each provider."""

from typing import Any, NamedTuple

from benchmarks.plots.canvas import SMALL, plain
from benchmarks.plots.colours import OURS, colour_of

# Inches for each line of text, and how many lines a picture holds.
LINE = 0.165
MOST_LINES = 64


class Bar(NamedTuple):
    """One bar: whose it is, its value with quartiles, and what is written at its end."""

    provider: str
    value: float
    words: str
    low: float | None = None
    high: float | None = None


class Block(NamedTuple):
    """A heading and the bars under it, one list for each panel; a panel may lack a provider."""

    heading: str
    panels: dict[str, list[Bar]]

    @property
    def providers(self) -> list[str]:
        """Every provider that some panel has, in order."""
        return list(dict.fromkeys(bar.provider for bars in self.panels.values() for bar in bars))


def pages(blocks: list[Block]) -> list[list[Block]]:
    """The blocks in pictures of about ``MOST_LINES`` lines or fewer, as even as order allows."""
    total = sum(_lines(block) for block in blocks)
    wanted = -(-total // MOST_LINES)
    found: list[list[Block]] = [[]]
    done = 0
    for block in blocks:
        if found[-1] and done + _lines(block) / 2 > total * len(found) / wanted:
            found.append([])
        found[-1].append(block)
        done += _lines(block)
    return found


def height_of(blocks: list[Block]) -> float:
    """Inches that the lines of a page need."""
    return LINE * sum(_lines(block) for block in blocks)


def _lines(block: Block) -> int:
    return 1 + len(block.providers)


def draw_labels(axes: Any, blocks: list[Block]) -> None:
    """Headings and providers at the left of a panel; all panels of a picture share them."""
    places: list[int] = []
    labels: list[str] = []
    headings: list[int] = []
    line = 0
    for block in blocks:
        headings.append(len(labels))
        places.append(line)
        labels.append(block.heading)
        for number, provider in enumerate(block.providers):
            places.append(line + 1 + number)
            labels.append(provider)
        line += _lines(block)
    axes.set_yticks(places, labels, fontsize=SMALL)
    for number, label in enumerate(axes.get_yticklabels()):
        label.set_fontweight("bold" if number in headings or labels[number] == OURS else "normal")
    axes.set_ylim(line - 0.4, -0.6)


def draw_bars(axes: Any, blocks: list[Block], panel: str, start: float) -> None:
    """The bars of one panel, from ``start`` to each value."""
    plain(axes)
    axes.tick_params(axis="y", length=0)
    line = 0
    for block in blocks:
        order = {provider: number for number, provider in enumerate(block.providers)}
        for bar in block.panels.get(panel, []):
            y = line + 1 + order[bar.provider]
            axes.barh(y, bar.value - start, 0.74, start, color=colour_of(bar.provider))
            end = max(bar.value, start)
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [y, y], color="black", linewidth=0.9)
                end = max(end, bar.high)
            axes.annotate(
                bar.words, (end, y), (3, 0), textcoords="offset points", va="center", fontsize=SMALL
            )
        if line:
            axes.axhline(line - 0.5, color="#DDDDDD", linewidth=0.6)
        line += _lines(block)
