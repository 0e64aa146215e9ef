"""Both parts of ``benchmarks.models`` as entries of a result document, one after the other."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.models.latency import latency, twins
from benchmarks.models.sampling import MODEL, PUBLISHED_STEPS, compare, pair, throughput

MANY_ROUNDS = 1000  # the seconds end a measurement


def sampling(
    batch_sizes: Sequence[int], seconds: float, *, steps: int = 2, quick: bool = False
) -> Iterator[dict[str, Any]]:
    """Sampling by the converted model beside the published loop; first both are compared."""
    model, published = pair(quick)
    error = compare(model, published)
    for batch_size in batch_sizes:
        (found,) = throughput(
            model, published, [batch_size], steps=steps, seconds=seconds, repeats=MANY_ROUNDS
        )
        yield {
            "name": f"{MODEL}: one guided step; images/s at {PUBLISHED_STEPS}",
            "batch_size": batch_size,
            "seconds": found["seconds"],
            "images_per_second": found["images_per_second"],
            "ratio": found["ratio"],
            "quartiles": found["quartiles"],
            "against": "published",
            "error": error,
            "rounds": found["rounds"],
        }


def latencies(
    sizes: Sequence[str], batch_sizes: Sequence[int], seconds: float, *, quick: bool = False
) -> Iterator[dict[str, Any]]:
    """One forward of EC-DiT beside its dense twin, whose output is another function's.

    Args:
        sizes: words that a pair's name contains one of.
        batch_sizes: images of a forward.
        seconds: for each of them.
        quick: at a depth of 2.
    """
    for each in twins(quick):
        if not any(f"-{size}/" in each.name for size in sizes):
            continue
        for batch_size in batch_sizes:
            (found,) = latency(each, [batch_size], seconds=seconds, repeats=MANY_ROUNDS)
            taken = {"ours": found["seconds"]["sparse"], "dense": found["seconds"]["dense"]}
            low, high = found["quartiles"]  # of sparse over dense
            yield {
                "name": f"{each.name}: one forward",
                "batch_size": batch_size,
                "seconds": taken,
                "images_per_second": {name: batch_size / value for name, value in taken.items()},
                "ratio": 1 / found["ratio"],
                "quartiles": [1 / high, 1 / low],
                "against": "dense",
                "macs_ratio": each.macs_ratio,
                "rounds": found["rounds"],
            }
