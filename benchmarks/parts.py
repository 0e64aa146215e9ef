"""What a suite has besides entries: whole models, first calls, shares of time by stage."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import first_calls
from benchmarks.entry import CPU
from benchmarks.registry import find_entry
from benchmarks.runner import Settings
from benchmarks.table import duration

# One layer of each kind, of the same tokens and width, is taken apart.
PROFILED = {
    "ec_layer/D384-T2048": ("one_hot", "good_eager", "dense_limit", "ours"),
    "dit_moe_layer/D384-T2048": ("published", "good_eager", "grouped_mm", "dense_limit", "ours"),
}
PROFILED_ON_GPU = ("gpu_ec_layer/B32-S256-D1152-E8", "gpu_dit_moe_layer/T8192-D1152-E8-K2")
FIRST_CALL_LAYERS = tuple(first_calls.LAYERS)


@dataclass(frozen=True)
class Context:
    """What a part needs to know.

    Attributes:
        settings: of the run.
        seconds: that the part may take; infinite without a limit.
        document: of the run; a part adds to the list of its key.
    """

    settings: Settings
    seconds: float
    document: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Something that is measured and is not an entry.

    Attributes:
        name: as ``--only`` finds it and the list of what was not measured names it.
        seconds: that it takes on two cores, about.
        run: measures it, adds each result to the document, and yields a line to print for it;
            raises ``ImportError`` where something optional is missing.
        summary: one line for ``--list``.
    """

    name: str
    seconds: float
    run: Callable[[Context], Iterator[str]]
    summary: str


def _models(sizes: tuple[str, ...], sampled: tuple[int, ...]) -> Callable[..., Iterator[str]]:
    def run(context: Context) -> Iterator[str]:
        try:
            from benchmarks.models import results
        except ImportError as error:  # the published model stands among the tests
            raise ImportError(f"models are measured from the repository's root: {error}") from error
        # Two figures for each batch size and kind of model, and as much again to build and compare.
        seconds = min(10 * context.settings.seconds, context.seconds / 8)
        for found in results.sampling(sampled, seconds):
            yield _model(context.document, found)
        for found in results.latencies(sizes, (1, 8), seconds):
            yield _model(context.document, found)

    return run


def _model(document: dict[str, Any], found: dict[str, Any]) -> str:
    document["models"].append(found)
    times = ", ".join(f"{name} {duration(value)}" for name, value in found["seconds"].items())
    return (
        f"{found['name']}, {found['batch_size']} images: {times}; "
        f"{found['against']}/ours {found['ratio']:.2f}"
    )


def _first_calls(names: tuple[str, ...]) -> Callable[[Context], Iterator[str]]:
    def run(context: Context) -> Iterator[str]:
        for found in first_calls.measure(names, context.seconds):
            context.document["compile"].append(found)
            words = found.get("reason") or (
                f"first call {found['first_seconds']:.1f} s, "
                f"then {duration(found['steady_seconds'])}"
            )
            yield f"{found['name']} {found['provider']}: {words}"

    return run


def _stage_shares(context: Context) -> Iterator[str]:
    from benchmarks import profiling

    for name, providers in PROFILED.items():
        found = profiling.profile_entry(find_entry(name), CPU, providers)
        context.document["stages"] += found
        # The longest operators are in the document; --profile prints them.
        yield from profiling.table_lines([{**row, "longest": []} for row in found])


MODELS_SHORT = Part(
    "models", 55.0, _models(("S",), (1,)), "DiT-MoE-S sampling, EC-DiT-S beside its dense twin"
)
MODELS = Part(
    "models", 400.0, _models(("S", "B"), (1, 8)), "DiT-MoE-S sampling, EC-DiT-S and B likewise"
)
FIRST_CALLS_SHORT = Part(
    *("first_calls", 95.0, _first_calls(FIRST_CALL_LAYERS[:1])),
    "import, first and steady calls, recompiles of one layer",
)
FIRST_CALLS = Part(
    "first_calls", 220.0, _first_calls(FIRST_CALL_LAYERS), "the same, and of a small layer"
)
STAGE_SHARES = Part("stages", 25.0, _stage_shares, "which stage of a layer takes the time")
