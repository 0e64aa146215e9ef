"""No address may be computed in 32 bits that such a launch makes larger than 32 bits.

Launches are recorded at sizes where every large tensor has more than 2^31 elements (meta tensors
cost nothing). Each integer operation that leads to the offset of a pointer, or to a coordinate of a
descriptor, must then keep within the width it is done in.
"""

from dataclasses import dataclass
from typing import Any

from triton._C.libtriton import ir
from triton.compiler import make_backend

from benchmarks.triton_check.ranges import INDICES, Bounds, Range, Ranges, full
from benchmarks.triton_check.specialize import Compilation
from benchmarks.triton_check.ttir import BlockArgument, Function, Operation, parse
from moe_kernels.backends.triton.launch import Launch

_FIRST_COORDINATE = {"tt.descriptor_load": 1, "tt.descriptor_store": 2, "tt.descriptor_gather": 1}
_SUMS = ("arith.addi", "arith.subi", "arith.muli", "arith.shli", "arith.trunci")

# Variables that the analysis cannot bound by itself, with the reason why they are bounded.
ASSUMED: dict[str, tuple[Range, str]] = {
    "n": (
        (0, (1 << 16) - 1),
        "first column of a tile: a column tile is what is left of the tile's number inside a group "
        "divided by the group's height, and the analysis does not relate the two",
    ),
    "expert": (
        (0, (1 << 14) - 1),
        "number of an expert: found by counting the experts before it",
    ),
}


@dataclass(frozen=True)
class Overflow:
    """An operation that can leave its width on the way to addresses."""

    kernel: str
    tensors: tuple[str, ...]
    location: str
    operation: str
    bits: int
    reaches: Range

    def __str__(self) -> str:
        return (
            f"{self.kernel}, {self.location}: {self.operation} in {self.bits} bits can reach "
            f"{max(self.reaches, key=abs):,} on the way to an address in "
            f"{', '.join(self.tensors)}; use int64 there"
        )


def overflows(launch: Launch, compilation: Compilation, largest_index: int) -> list[Overflow]:
    """Every operation on the way to an address that this launch can make overflow.

    Args:
        launch: at a large size.
        compilation: of it.
        largest_index: bound of what is read from memory as a number: tokens, rows, counts.
    """
    return find_overflows(parse(_ttir(compilation)), launch, largest_index)


def find_overflows(function: Function, launch: Launch, largest_index: int) -> list[Overflow]:
    """The same for a parsed kernel; of a chain of operations only the first that overflows."""
    ranges = Ranges(function, _bounds(launch, largest_index))
    tensors: dict[str, list[str]] = {}
    wide: dict[str, Operation] = {}
    for operation in function.operations:
        for offset in _offsets(operation):
            for found in _leaving_their_width(ranges, offset):
                wide[found.results[0]] = found
                names = tensors.setdefault(found.results[0], [])
                name = _tensor(function, operation.operands[0])
                names += [] if name in names else [name]
    overflows = []
    for result, found in wide.items():
        behind = [value for operand in found.operands for value in _slice(ranges, operand)]
        if not wide.keys() & set(behind):
            overflows.append(
                Overflow(
                    launch.kernel.__name__,
                    tuple(tensors[result]),
                    found.location,
                    found.name,
                    found.integer_bits(),
                    ranges.exact(found, result),
                )
            )
    return overflows


def _offsets(operation: Operation) -> list[str]:
    if operation.name == "tt.addptr":
        return operation.operands[1:2]
    if operation.name in _FIRST_COORDINATE:
        return operation.operands[_FIRST_COORDINATE[operation.name] :]
    return []


def _slice(ranges: Ranges, value: str) -> list[str]:
    """Values that ``value`` is computed from, itself included, up to what bounds them."""
    seen, pending = [value], [value]
    while pending:
        value = pending.pop()
        maker = ranges.function.made_by.get(value)
        values: list[str] = []
        if isinstance(maker, BlockArgument):
            is_induction = maker.role == "induction"
            values = maker.owner.operands[1:3] if is_induction else [maker.initial]
        elif maker is not None and maker.name not in INDICES and not ranges.is_assumed(value):
            values = [*maker.operands, *(inner for ends in maker.yields for inner in ends)]
        new = [value for value in dict.fromkeys(values) if value and value not in seen]
        seen += new
        pending += new
    return seen


def _leaving_their_width(ranges: Ranges, offset: str) -> list[Operation]:
    """Operations on the way to ``offset`` that can overflow."""
    found = []
    for value in _slice(ranges, offset):
        maker = ranges.function.made_by.get(value)
        if isinstance(maker, Operation) and maker.name in _SUMS and not ranges.is_assumed(value):
            low, high = full(maker.integer_bits() or 64)
            reached = ranges.exact(maker, value)
            if reached[0] < low or reached[1] > high:
                found.append(maker)
    return found


def _tensor(function: Function, pointer: str) -> str:
    """Name of the argument that a pointer comes from."""
    for _ in range(1000):
        maker = function.made_by.get(pointer)
        if maker is None:
            return pointer.lstrip("%")
        pointer = maker.initial if isinstance(maker, BlockArgument) else maker.operands[0]
    return "?"


def _bounds(launch: Launch, largest_index: int) -> Bounds:
    numbers = {
        name: int(value) for name, value in launch.args.items() if isinstance(value, (int, bool))
    }
    assumed = {name: bound for name, (bound, _) in ASSUMED.items()}
    return Bounds(numbers, launch.grid, largest_index, assumed)


def _ttir(compilation: Compilation) -> str:
    """The kernel in Triton's first language; nothing behind it is needed."""
    target, source = compilation.target, compilation.source
    backend: Any = make_backend(target)
    options = backend.parse_options(dict(compilation.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(),
        context,
    )  # fmt: skip
    return str(stages["ttir"](module, {}))
