"""Between which integers a value of a kernel can lie, for one launch.

Exact for arguments and program numbers, because the launch is known; an index read from memory is
below the number of elements of the largest index tensor. What is not understood is unbounded.
"""

import re
from dataclasses import dataclass

from benchmarks.triton_check.ttir import BlockArgument, Function, Operation

Range = tuple[int, int]

# Operations whose result has the range of their operands.
_SAME = {
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
    "tt.trans",
    "tt.cat",
    "tt.join",
    "tt.split",
    "arith.extsi",
    "arith.extui",
    "arith.index_cast",
    "arith.index_castui",
}
# Reductions and scans make counts, sums of counts and positions: indices.
INDICES = {
    "tt.load",
    "tt.reduce",
    "tt.scan",
    "tt.histogram",
    "tt.gather",
    "tt.atomic_rmw",
    "scf.while",
}


def full(bits: int) -> Range:
    """Every signed integer of a width; of one bit, false and true."""
    return (0, 1) if bits == 1 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


@dataclass(frozen=True)
class Bounds:
    """What is known of a launch.

    Attributes:
        arguments: integer arguments by name.
        grid: programs in each dimension.
        largest_index: no index read from memory is larger.
        assumed: ranges of variables by their name in the source, where the analysis is too weak.
    """

    arguments: dict[str, int]
    grid: tuple[int, ...]
    largest_index: int
    assumed: dict[str, Range]


class Ranges:
    """Ranges of the values of a function; every value is looked at once."""

    def __init__(self, function: Function, bounds: Bounds) -> None:
        self.function, self.bounds = function, bounds
        self._known: dict[str, Range] = {}
        self._open: set[str] = set()

    def of(self, value: str) -> Range:
        """The range of a value."""
        if value not in self._known:
            if value in self._open:  # a loop feeds it to itself
                return (0, self.bounds.largest_index)
            self._open.add(value)
            found = self._find(value)
            if self.is_assumed(value):
                low, high = self.bounds.assumed[_variable(value)]
                found = max(found[0], low), min(found[1], high)
            self._open.discard(value)
            self._known[value] = found
        return self._known[value]

    def is_assumed(self, value: str) -> bool:
        """Whether a range was given for the value."""
        return _variable(value) in self.bounds.assumed

    def _find(self, value: str) -> Range:
        maker = self.function.made_by.get(value)
        if maker is None:
            known = self.bounds.arguments.get(value.lstrip("%"))
            return full(64) if known is None else (known, known)
        if isinstance(maker, BlockArgument):
            return self._block_argument(maker)
        return clip(self.exact(maker, value), maker.integer_bits())

    def _block_argument(self, argument: BlockArgument) -> Range:
        if argument.role == "induction":
            low, high = (self.of(operand) for operand in argument.owner.operands[1:3])
            return low[0], max(high[1] - 1, low[0])
        if argument.role == "carried":
            return hull(self.of(argument.initial), (0, self.bounds.largest_index))
        return (0, self.bounds.largest_index)

    def exact(self, operation: Operation, result: str) -> Range:
        """Of an operation's result as if integers had no width."""
        name = operation.name
        if name == "arith.constant":
            return _constant(operation.text)
        if name == "tt.get_program_id":
            return 0, self._programs(operation) - 1
        if name == "tt.get_num_programs":
            return (self._programs(operation),) * 2
        if name == "tt.make_range":
            first, last = (int(_attribute(operation.text, key)) for key in ("start", "end"))
            return first, last - 1
        if name in INDICES:
            return 0, self.bounds.largest_index
        if name in ("scf.if", "scf.for"):
            return self._region(operation, result)
        if name == "arith.select":
            return hull(*(self.of(operand) for operand in operation.operands[1:3]))
        operands = [self.of(operand) for operand in operation.operands]
        if name in _SAME:
            return hull(*operands)
        if name in ("arith.cmpi", "arith.cmpf"):
            return (0, 1)
        if name == "arith.trunci":
            return operands[0]
        found = arithmetic(name, operands)
        return full(operation.integer_bits() or 64) if found is None else found

    def _programs(self, operation: Operation) -> int:
        axis = "xyz".index(operation.text.split()[1])
        return self.bounds.grid[axis] if axis < len(self.bounds.grid) else 1

    def _region(self, operation: Operation, result: str) -> Range:
        position = int(result.partition("#")[2] or 0)
        ends = [self.of(values[position]) for values in operation.yields if len(values) > position]
        if operation.name == "scf.for":
            carried = [
                argument.initial
                for argument in self.function.made_by.values()
                if isinstance(argument, BlockArgument)
                and argument.owner is operation
                and argument.role == "carried"
                and argument.position == position
            ]
            ends += [self.of(initial) for initial in carried]
        return hull(*ends) if ends else full(64)


def _variable(value: str) -> str:
    """Name in the source: ``%column_12`` is a ``column``."""
    return re.sub(r"_\d+$", "", value.lstrip("%").partition("#")[0])


def hull(*ranges: Range) -> Range:
    """The smallest range around others."""
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def clip(found: Range, bits: int) -> Range:
    """What is left of a range in a width; all of it when it wraps around."""
    limits = full(bits or 64)
    return found if limits[0] <= found[0] and found[1] <= limits[1] else limits


def arithmetic(name: str, operands: list[Range]) -> Range | None:
    """Range of a result from the operands' ranges; ``None`` for what is not understood."""
    if len(operands) != 2:
        return None
    (a, b), (c, d) = operands
    short = name.removeprefix("arith.")
    if short == "addi":
        return a + c, b + d
    if short == "subi":
        return a - d, b - c
    if short == "muli":
        products = (a * c, a * d, b * c, b * d)
        return min(products), max(products)
    if short in ("minsi", "minui"):
        return min(a, c), min(b, d)
    if short in ("maxsi", "maxui"):
        return max(a, c), max(b, d)
    if short in ("divsi", "divui", "floordivsi", "ceildivsi"):
        return _quotient((a, b), (c, d))
    if short in ("remsi", "remui"):
        largest = max(abs(c), abs(d)) - 1
        return (0 if a >= 0 else -largest), (min(b, largest) if a >= 0 else largest)
    if short == "andi" and (a >= 0 or c >= 0):
        return 0, min(bound for bound, low in ((b, a), (d, c)) if low >= 0)
    if short in ("ori", "xori") and a >= 0 and c >= 0:
        return 0, (1 << max(b, d).bit_length()) - 1
    if short == "shli" and c >= 0 and d < 64:
        ends = (a << c, a << d, b << c, b << d)
        return min(ends), max(ends)
    if (short == "shrsi" or (short == "shrui" and a >= 0)) and c >= 0:
        ends = (a >> c, a >> min(d, 64), b >> c, b >> min(d, 64))
        return min(ends), max(ends)
    return None


def _quotient(number: Range, divisor: Range) -> Range:
    divisors = [end for end in divisor if end != 0]
    if divisor[0] <= 0 <= divisor[1]:  # a division by zero does not happen: next to it is 1
        divisors += [end for end in (-1, 1) if divisor[0] <= end <= divisor[1]]
    ends = [_towards_zero(end, by) for end in number for by in divisors]
    ends += [0] if number[0] <= 0 <= number[1] else []
    return (min(ends), max(ends)) if ends else (0, 0)


def _towards_zero(number: int, divisor: int) -> int:
    quotient = abs(number) // abs(divisor)
    return quotient if (number < 0) == (divisor < 0) else -quotient


def _constant(text: str) -> Range:
    found = re.match(r"arith\.constant (?:dense<)?(-?\d+|true|false)>?(?: :|$)", text)
    if not found:
        return full(64)
    word = found.group(1)
    number = {"true": 1, "false": 0}.get(word)
    return (int(word),) * 2 if number is None else (number, number)


def _attribute(text: str, key: str) -> str:
    found = re.search(rf"\b{key} = (-?\d+)", text)
    assert found, text
    return found.group(1)
