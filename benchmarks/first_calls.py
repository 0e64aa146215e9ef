"""Seconds until a layer runs, each case in a fresh process: ``python -m benchmarks.first_calls``.

Importing, building, the first forward and backward with empty caches of compiled code, later ones,
and what ``torch.compile`` does when the number of tokens changes. On the CPU; a GPU's first calls
are those of ``benchmarks.gpu.first_call``.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

# A child imports PyTorch and the library on the clock, so nothing here may import them before.
if TYPE_CHECKING:
    from torch import Tensor

    Layer = Callable[[Tensor], tuple[Tensor, ...]]

# One layer large enough to be of use, one where the calls themselves are the time.
LAYERS: dict[str, dict[str, int]] = {
    "first_call/dit_moe-D384-T512": {"D": 384, "T": 512, "E": 8, "K": 2},
    "first_call/dit_moe-D32-T64": {"D": 32, "T": 64, "E": 8, "K": 2},
}
PROVIDERS = ("ours", "good_eager", "ours_compiled", "compiled")
LIMIT_SECONDS = 240.0  # of one child
STEADY_CALLS = 5


def measure(
    names: Sequence[str] = tuple(LAYERS),
    seconds_left: float = float("inf"),
    *,
    providers: Sequence[str] = PROVIDERS,
    threads: int = 0,
    limit: float = LIMIT_SECONDS,
) -> Iterator[dict[str, Any]]:
    """One row for each layer and provider, those without ``torch.compile`` first.

    Args:
        names: keys of ``LAYERS``.
        seconds_left: for all of them; a case that it does not reach gives its reason.
        providers: some of ``PROVIDERS``.
        threads: of PyTorch; 0 for as many as this process has.
        limit: seconds of one case.

    Returns:
        Rows with ``name``, ``provider`` and either ``reason`` or ``import_seconds``,
        ``build_seconds``, ``first_seconds`` (forward and backward), ``steady_seconds`` (median of
        later ones), ``new_size_seconds`` (the first at two other numbers of tokens),
        ``graph_breaks`` and ``recompiles`` (frames compiled after the first call; ``None`` without
        ``torch.compile``, which has its default settings).
    """
    end = time.monotonic() + seconds_left
    cases = [(name, provider) for provider in providers for name in names]
    for name, provider in sorted(cases, key=lambda case: case[1].endswith("compiled")):
        left = min(limit, end - time.monotonic())
        reason = None if left > 1 else "no time"
        if reason is None and provider.endswith("compiled"):
            reason = why_not_compiled()
        found = {"reason": reason} if reason else _child(name, provider, threads, left)
        yield {"name": name, "provider": provider, **found}


def _child(name: str, provider: str, threads: int, seconds: float) -> dict[str, Any]:
    import torch

    from benchmarks.environment import ROOT
    from benchmarks.gpu.jobs import Job, run_jobs

    command = [sys.executable, "-m", "benchmarks.first_calls", "--child", name, provider]
    number = str(threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as empty:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": empty,
            "TMPDIR": empty,  # compiled headers are kept there, whatever the cache's folder is
            "OMP_NUM_THREADS": number,
            "MKL_NUM_THREADS": number,
        }
        job = Job(name, command, environment)
        outcome = run_jobs([job], at_once=1, seconds=seconds, folder=ROOT).get(name)
    if outcome is None or outcome.status is None:
        return {"reason": f"did not end within {seconds:.0f} s"}
    if outcome.status == 0:
        lines = [line for line in outcome.output.splitlines() if line.startswith("{")]
        return dict(json.loads(lines[-1]))  # compiler processes may have the last word
    return {"reason": (outcome.last_line or f"ended with status {outcome.status}")[:200]}


def in_this_process(
    name: str, provider: str, now: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Figures of one case; the imports count only in a process that has not made them."""
    began = now()
    import torch

    ours, compiled = provider.startswith("ours"), provider.endswith("compiled")
    if ours:
        import moe_kernels  # noqa: F401
    if compiled:
        import torch._inductor.compile_fx  # the first call would
    import_seconds = now() - began
    import benchmarks.stages  # noqa: F401 (for the plain layer, off the clock)

    shape, began = LAYERS[name], now()
    layer = _ours(shape) if ours else _good_eager(shape)
    if compiled:
        layer = torch.compile(layer)
    build_seconds = now() - began

    def seconds_of(tokens: int) -> float:
        x = torch.randn(1, tokens, shape["D"], requires_grad=True)
        began = now()
        out, loss = layer(x)
        (out.sum() + loss).backward()
        return now() - began

    tokens = shape["T"]
    first_seconds = seconds_of(tokens)
    graphs, frames = _compiled_so_far()
    steady = sorted(seconds_of(tokens) for _ in range(STEADY_CALLS))
    new_size_seconds = [seconds_of(size) for size in (tokens + tokens // 2, 2 * tokens)]
    return {
        "import_seconds": import_seconds,
        "build_seconds": build_seconds,
        "first_seconds": first_seconds,
        "steady_seconds": steady[STEADY_CALLS // 2],
        "new_size_seconds": new_size_seconds,
        "graph_breaks": graphs - 1 if compiled else None,
        "recompiles": _compiled_so_far()[1] - frames if compiled else None,
    }


def why_not_compiled() -> str | None:
    """Why ``torch.compile`` cannot generate code for this CPU, or ``None``.

    Asked by the parent: a child would have imported the code generator off the clock.
    """
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:  # a private type that moves between versions of PyTorch
        return f"torch.compile needs a C++ compiler (g++, clang++ or $CXX): {type(error).__name__}"
    return None


def _compiled_so_far() -> tuple[int, int]:
    """Graphs that Dynamo has captured in this process, and frames that it has compiled."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], counters["frames"]["ok"]


def _ours(shape: dict[str, int]) -> "Layer":
    import moe_kernels as mk

    hidden_size, experts = shape["D"], shape["E"]
    layer = mk.MoE(
        hidden_size,
        4 * hidden_size,
        experts,
        router=mk.TokenChoiceRouter(hidden_size, experts, shape["K"]),
        activation="swiglu",
        shared_intermediate_size=2 * hidden_size,
    )

    def call(x: "Tensor") -> tuple["Tensor", ...]:
        out, plan = layer(x)
        return out, mk.load_balance_loss(plan)

    return call


def _good_eager(shape: dict[str, int]) -> "Layer":
    import torch

    from benchmarks.stages.dit_moe_peers import good_eager

    hidden_size, experts, top_k = shape["D"], shape["E"], shape["K"]
    width = 4 * hidden_size

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.nn.Parameter(torch.randn(sizes) * sizes[-1] ** -0.5)

    router = drawn(experts, hidden_size)
    w_in = drawn(experts, 2 * width, hidden_size)
    w_out = drawn(experts, hidden_size, width)
    shared = drawn(width, hidden_size), drawn(hidden_size, width // 2)
    return lambda x: good_eager(x, router, w_in, w_out, shared, top_k)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row as JSON for each case; 1 when one has no figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_calls", description=__doc__)
    parser.add_argument("--names", nargs="+", choices=tuple(LAYERS), default=tuple(LAYERS))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all cases")
    parser.add_argument("--threads", type=int, default=0, help="0: as PyTorch chooses")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "PROVIDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(in_this_process(*options.child)))
        return 0
    rows = measure(
        options.names,
        60 * options.minutes,
        providers=options.providers,
        threads=options.threads,
    )
    missing = 0
    for row in rows:
        print(json.dumps(row), flush=True)
        missing += "reason" in row
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
