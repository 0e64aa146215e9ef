"""Compiling, in parallel processes, with Triton's cache on disk."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import triton

from benchmarks.triton_check.figures import Figures, figures_of
from benchmarks.triton_check.specialize import Compilation

# Inherited by the processes, which are forked: sources hold functions that cannot be sent.
_pending: list[Compilation] = []


@dataclass(frozen=True)
class Built:
    """What came of one compilation: figures, or why there are none; and the time it took."""

    compilation: Compilation
    figures: Figures | None
    error: str
    seconds: float


def build(compilations: list[Compilation], jobs: int | None = None) -> Iterator[Built]:
    """Compile everything, results in order."""
    global _pending
    _pending = compilations
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=context) as pool:
        results = pool.map(_build_one, range(len(compilations)), chunksize=4)
        for compilation, result in zip(compilations, results, strict=True):
            yield Built(compilation, *result)


def _build_one(index: int) -> tuple[Figures | None, str, float]:
    compilation, start = _pending[index], time.perf_counter()
    try:
        binary = triton.compile(
            compilation.source, target=compilation.target, options=compilation.options
        )
    except Exception as error:  # the compiler raises many types; each is a finding of this check
        return None, summary(error), time.perf_counter() - start
    return figures_of(binary, compilation), "", time.perf_counter() - start


def summary(error: BaseException) -> str:
    """Type, place and the last words of a compiler's error; between them it quotes the kernel."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    words = lines if len(lines) < 4 else [lines[0], *lines[-3:]]
    return f"{type(error).__name__}: {' | '.join(words)}"[:500]
