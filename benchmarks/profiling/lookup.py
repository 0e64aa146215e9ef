"""From the name of an operator or a kernel, and who called it, to the stage; pure functions."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.profiling import names
from benchmarks.profiling.stages import BACKWARD, BETWEEN, COMPILED, FUSED, OTHER, PRODUCTS, ROUTER


class Called(NamedTuple):
    """An operator as the profiler saw it: its name and the shapes of its arguments."""

    name: str
    shapes: Sequence[Sequence[int]] = ()


class Sizes(NamedTuple):
    """What tells the router's product from the others: its side is the number of experts."""

    experts: int
    tokens: int


def stage_of_operators(chain: Sequence[Called], sizes: Sizes) -> str:
    """The stage that the time of an operator itself belongs to.

    Args:
        chain: the operator, the one that called it, and so on, the outermost last.
        sizes: of the layer.
    """
    if not chain:
        return BETWEEN
    backward = any(called.name.startswith(names.NODE) for called in chain)
    return _stage(chain, sizes) + (BACKWARD if backward else "")


def stage_of_kernel(name: str, chain: Sequence[Called], sizes: Sizes) -> str:
    """The stage of a kernel on a GPU.

    Args:
        name: of the kernel.
        chain: operators that started it, as for ``stage_of_operators``; empty when nobody knows.
        sizes: of the layer.
    """
    started = stage_of_operators(chain, sizes) if chain else OTHER
    backward = started.endswith(BACKWARD) or re.search(names.BACKWARD_KERNELS, name) is not None
    stage = started.removesuffix(BACKWARD)
    if stage in (OTHER, FUSED, COMPILED):  # the kernel says more than who started it
        matches = (found for pattern, found in names.KERNELS if re.search(pattern, name))
        stage = next(matches, stage)
    return stage + (BACKWARD if backward else "")


def ours_of(name: str) -> str | None:
    """The op of ours that an event stands for; ``None`` for others."""
    found = re.fullmatch(names.OURS_PATTERN, name.removeprefix(names.NODE))
    if found is None or found["op"] not in names.OURS:
        return None
    return found["op"] if found["library"] or found["backend"] else None


def _stage(chain: Sequence[Called], sizes: Sizes) -> str:
    for called in reversed(chain):
        ours = ours_of(called.name)
        if ours is not None:
            return names.OURS[ours]
    # The outermost knows best what it is for: an index_put copies, a backward adds.
    nodes = (names.NODES.get(_node(called.name)) for called in reversed(chain))
    operators = [_operator(called.name) for called in reversed(chain)]
    plain = (stage for stage in operators if stage != COMPILED)
    unknown = COMPILED if COMPILED in operators else OTHER
    found = next(filter(None, nodes), None) or next(filter(None, plain), unknown)
    routes = found == PRODUCTS and any(_of_router(called, sizes) for called in chain)
    return ROUTER if routes else found


def _node(name: str) -> str:
    """``Mm`` from ``autograd::engine::evaluate_function: MmBackward0``."""
    found = re.fullmatch(r"(\w+)Backward\d*", name.removeprefix(names.NODE))
    return found[1] if found else ""


def _operator(name: str) -> str | None:
    if name.startswith(names.COMPILED_PREFIXES):
        return COMPILED
    return names.OPERATORS.get(name.removeprefix("aten::").removesuffix("_"))


def _of_router(called: Called, sizes: Sizes) -> bool:
    """Whether a product of two matrices makes router logits, or gradients from theirs."""
    experts, tokens = sizes
    shapes = [list(shape) for shape in called.shapes]
    if _node(called.name):  # its argument is the gradient of the logits
        return shapes[:1] == [[tokens, experts]]
    skipped = 1 if "addmm" in called.name else 0  # what is added
    factors = shapes[skipped : skipped + 2]
    if _operator(called.name) != PRODUCTS or [len(shape) for shape in factors] != [2, 2]:
        return False
    first, second = factors
    logits = first[0] == tokens and experts in (*second, first[1])
    of_weight = first == [experts, tokens]
    return logits or of_weight
