"""What each stage of a layer must compute and move, as formulas over its sizes.

FLOPs are those of matrix products. Bytes count every tensor that a stage reads or writes once, as
if what is read again came from a cache. The stages are those of the fused layer: gather in the
prologue of the first product, activation in epilogues, h kept, the activation computed again in
backward.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.roofline.shapes import Gpu, Layer

INDEX = 4  # bytes of an index, and of a number of the router: both have 32 bits

Elements = Callable[[Layer], int]


@dataclass(frozen=True)
class Traffic:
    """A tensor that a stage reads or writes.

    Attributes:
        tensor: its name, with ``reads`` or ``writes``.
        elements: how many, from the layer.
        reason: why so many.
        is_32_bit: index or router number, whatever the dtype of the tokens is.
    """

    tensor: str
    elements: Elements
    reason: str
    is_32_bit: bool = False

    def bytes(self, layer: Layer, itemsize: int) -> int:
        return self.elements(layer) * (INDEX if self.is_32_bit else itemsize)


@dataclass(frozen=True)
class Stage:
    """One stage: matrix FLOPs and traffic; ``inside`` names the stage whose kernel runs it."""

    name: str
    is_backward: bool
    flops: Elements
    traffic: tuple[Traffic, ...]
    inside: str = ""

    def bytes(self, layer: Layer, itemsize: int = 2) -> int:
        """Bytes read and written for tokens and weights of ``itemsize`` bytes."""
        return sum(part.bytes(layer, itemsize) for part in self.traffic)


@dataclass(frozen=True)
class Floor:
    """The least time of stages that run one after the other.

    Attributes:
        seconds: at the rates that large products and copies reach.
        peak_seconds: at the data sheet's.
        arithmetic: the part of ``seconds`` that arithmetic, not traffic, sets.
    """

    seconds: float
    peak_seconds: float
    arithmetic: float


def floor_of(stages: list[Stage], layer: Layer, gpu: Gpu) -> Floor:
    """The larger of arithmetic and traffic of every kernel; stages inside another share its."""
    kernels: dict[str, list[Stage]] = {}
    for stage in stages:
        kernels.setdefault(stage.inside or stage.name, []).append(stage)
    seconds = peak = arithmetic = 0.0
    for parts in kernels.values():
        flops = sum(part.flops(layer) for part in parts)
        moved = sum(part.bytes(layer) for part in parts)
        by_flops, by_bytes = flops / gpu.reachable_flops, moved / gpu.reachable_bytes
        seconds += max(by_flops, by_bytes)
        peak += max(flops / gpu.peak_flops, moved / gpu.peak_bytes)
        arithmetic += by_flops if by_flops >= by_bytes else 0.0
    return Floor(seconds, peak, arithmetic)


def _logits(layer: Layer) -> int:
    return layer.num_tokens * layer.num_experts


def _tokens(layer: Layer) -> int:
    return layer.num_tokens * layer.hidden_size


def _rows(layer: Layer) -> int:
    return layer.num_rows * layer.hidden_size


def _h(layer: Layer) -> int:
    return layer.num_rows * layer.width


def _a(layer: Layer) -> int:
    return layer.num_rows * layer.intermediate_size


def _row_list(layer: Layer) -> int:
    return layer.num_rows


def _w_in(layer: Layer) -> int:
    return layer.num_experts * layer.width * layer.hidden_size


def _w_out(layer: Layer) -> int:
    return layer.num_experts * layer.hidden_size * layer.intermediate_size


def _up_flops(layer: Layer) -> int:
    return 2 * layer.num_rows * layer.hidden_size * layer.width


def _down_flops(layer: Layer) -> int:
    return 2 * layer.num_rows * layer.hidden_size * layer.intermediate_size


def _no_flops(layer: Layer) -> int:
    return 0


_TOKEN_OF_ROW = Traffic("reads token_indices", _row_list, "one of each row", True)
_ROWS_OF_TOKEN = Traffic("reads row_indices", _row_list, "each row belongs to one token", True)
_WEIGHTS = Traffic("reads routing_weights", _row_list, "one of each row", True)

_UP = "up-projection, activation"

STAGES = (
    Stage(
        "route",
        False,
        _no_flops,
        (
            Traffic("reads router_logits", _logits, "every token scores every expert", True),
            Traffic("writes routing_weights", _row_list, "one of each row", True),
            Traffic("writes plan", lambda s: s.num_indices, "its one buffer of indices", True),
        ),
    ),
    Stage(
        "gather (in the prologue)",
        False,
        _no_flops,
        (
            _TOKEN_OF_ROW,
            Traffic("reads x", _rows, "a token's row for each expert that has it"),
        ),
        inside=_UP,
    ),
    Stage(
        _UP,
        False,
        _up_flops,
        (
            Traffic("reads w_in", _w_in, "every expert has rows"),
            Traffic("writes h", _h, "kept for backward"),
            Traffic("writes a", _a, "read by the next product"),
        ),
    ),
    Stage(
        "down-projection",
        False,
        _down_flops,
        (
            Traffic("reads a", _a, "operand"),
            Traffic("reads w_out", _w_out, "every expert has rows"),
            Traffic("writes y", _rows, "a row for each token and expert; summed by the next stage"),
        ),
    ),
    Stage(
        "combine",
        False,
        _no_flops,
        (
            Traffic("reads y", _rows, "every row is summed once"),
            _WEIGHTS,
            _ROWS_OF_TOKEN,
            Traffic("writes out", _tokens, "a row for each token"),
        ),
    ),
    Stage(
        "d(activation), dh, dweights",
        True,
        _down_flops,
        (
            _TOKEN_OF_ROW,
            _WEIGHTS,
            Traffic("reads dout", _rows, "gathered: a token's row for each of its experts"),
            Traffic("reads w_out", _w_out, "operand"),
            Traffic("reads h", _h, "the activation is computed again from it"),
            Traffic("writes dh", _h, "operand of the next products"),
            Traffic("writes a", _a, "times the routing weight: operand of dw_out"),
            Traffic("writes dweights", _row_list, "sum of da * a over a row", True),
        ),
    ),
    Stage(
        "dw_out",
        True,
        _down_flops,
        (
            _TOKEN_OF_ROW,
            Traffic("reads dout", _rows, "gathered again, not stored as rows"),
            Traffic("reads a", _a, "operand"),
            Traffic("writes dw_out", _w_out, "every expert's, zeros where it has no rows"),
        ),
    ),
    Stage(
        "dw_in",
        True,
        _up_flops,
        (
            _TOKEN_OF_ROW,
            Traffic("reads dh", _h, "operand"),
            Traffic("reads x", _rows, "gathered again, not kept as rows"),
            Traffic("writes dw_in", _w_in, "every expert's, zeros where it has no rows"),
        ),
    ),
    Stage(
        "d(rows)",
        True,
        _up_flops,
        (
            Traffic("reads dh", _h, "operand"),
            Traffic("reads w_in", _w_in, "operand"),
            Traffic("writes d(rows)", _rows, "summed by the next stage"),
        ),
    ),
    Stage(
        "dx",
        True,
        _no_flops,
        (
            Traffic("reads d(rows)", _rows, "every row is summed once"),
            _ROWS_OF_TOKEN,
            Traffic("writes dx", _tokens, "a row for each token"),
        ),
    ),
    Stage(
        "route backward",
        True,
        _no_flops,
        (
            Traffic("reads router_logits", _logits, "affinities are computed again", True),
            Traffic("reads dweights", _row_list, "one of each row", True),
            Traffic("reads row_indices", _row_list, "rows of each token", True),
            Traffic(
                "reads row_experts", _row_list, "the logit that a row's weight came from", True
            ),
            Traffic("writes dlogits", _logits, "of every logit, losses included", True),
        ),
    ),
)


def kept_by_ours(layer: Layer, itemsize: int = 2) -> int:
    """Bytes kept for backward: x, h and what routing keeps; the experts' weights not counted."""
    small = layer.num_rows + layer.num_indices + _logits(layer)
    return itemsize * (_tokens(layer) + _h(layer)) + INDEX * small


def kept_by_eager(layer: Layer, itemsize: int = 2, fused_activation: bool = False) -> int:
    """The same for PyTorch's operations one after the other, without waste.

    Gathered rows (operand of the first product), h (input of the activation), a (operand of the
    second), y (for the gradient of the routing weights), and what routing keeps. SwiGLU's product
    of two halves keeps silu(gate) besides, unless somebody fuses the activation.
    """
    small = layer.num_rows + layer.num_indices + _logits(layer)
    silu = _a(layer) if layer.gated and not fused_activation else 0
    return itemsize * (2 * _rows(layer) + _h(layer) + _a(layer) + silu) + INDEX * small
