"""Statistics of interleaved samples: medians, and ratios taken round by round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values; ``share`` 0.5 is the median."""
    ranked = sorted(values)
    position = share * (len(ranked) - 1)
    below = int(position)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (position - below) * (ranked[above] - ranked[below])


@dataclass(frozen=True)
class Summary:
    """Median with the lower and upper quartile."""

    median: float
    low: float
    high: float


def summarize(values: Sequence[float]) -> Summary:
    """Median and quartiles of at least one value."""
    return Summary(quantile(values, 0.5), quantile(values, 0.25), quantile(values, 0.75))


def ratios(samples: Mapping[str, Sequence[float]], ours: str = "ours") -> dict[str, Summary]:
    """other/ours of every other provider, summarised over the rounds.

    A round times all providers one after the other, so that what slows the machine for a while
    slows both sides of a ratio.
    """
    return {
        name: summarize([value / base for value, base in zip(values, samples[ours], strict=True)])
        for name, values in samples.items()
        if name != ours
    }


def slower(
    found: Mapping[str, Summary], plain: Sequence[str], margin: float = 0.03
) -> dict[str, float]:
    """Plain alternatives that beat ours by more than ``margin``, with other/ours."""
    return {
        name: summary.median
        for name, summary in found.items()
        if name in plain and summary.median < 1 - margin
    }
