"""Triton's first intermediate language, as text: which operation makes which value."""

import re
from dataclasses import dataclass, field

_VALUE = re.compile(r"%[A-Za-z0-9_$.-]+(?:#\d+)?")
_RESULTS = re.compile(r"^(%[A-Za-z0-9_$.-]+(?::\d+)?(?:, %[A-Za-z0-9_$.-]+(?::\d+)?)*) = (.*)$")
_LOCATION = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)$")
_ITER_ARG = re.compile(r"(%[A-Za-z0-9_$.-]+) = (%[A-Za-z0-9_$.-]+(?:#\d+)?)")


@dataclass
class Operation:
    """One operation.

    Attributes:
        name: ``arith.addi``, ``tt.addptr``, ...
        text: the line without results and location.
        operands: values read, in order.
        results: values made.
        yields: operands of the terminators of its regions, one list for each.
        location: ``file:line``, as far as it is known.
    """

    name: str
    text: str
    operands: list[str]
    results: list[str]
    location: str = ""
    yields: list[list[str]] = field(default_factory=list)

    @property
    def result_type(self) -> str:
        """The last type of the line: the result's for most operations."""
        return self.text.rsplit(" -> ", 1)[-1].rsplit(" : ", 1)[-1].rsplit(" to ", 1)[-1]

    def integer_bits(self) -> int:
        """Width of the result's integers; 0 for another type."""
        found = re.search(r"(?:^|x)i(\d+)>?\)?$", self.result_type.strip())
        return int(found.group(1)) if found else 0


@dataclass(frozen=True)
class BlockArgument:
    """A value that a region begins with.

    Attributes:
        owner: the operation of the region.
        role: ``"induction"``, ``"carried"`` or ``"other"``.
        position: among the carried values.
        initial: what a carried value starts from.
    """

    owner: Operation
    role: str
    position: int = 0
    initial: str = ""


@dataclass
class Function:
    """The kernel: its arguments, every operation, and what defines a value."""

    arguments: list[str] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    made_by: dict[str, Operation | BlockArgument] = field(default_factory=dict)


def parse(text: str) -> Function:
    """Read a module with one function; inlined, as ``make_ttir`` leaves it."""
    locations = _locations(text)
    function = Function()
    open_regions: list[Operation] = []
    for raw in text.splitlines():
        line = raw.strip()
        if line.startswith("tt.func"):
            function.arguments = re.findall(r"%([A-Za-z0-9_]+):", line)
        elif line.startswith("}"):
            _close(line, open_regions, locations)
        elif line.startswith("^"):
            names = re.findall(r"(%[A-Za-z0-9_$.-]+):", line)
            for name in names:
                function.made_by[name] = BlockArgument(open_regions[-1], "other")
        elif line and not line.startswith(("#", "module")):
            _operation(line, function, open_regions, locations)
    return function


def _operation(
    line: str, function: Function, open_regions: list[Operation], locations: dict[str, str]
) -> None:
    where = re.findall(r"loc\((#loc\d*)\)$", line)
    body = _LOCATION.sub("", line)
    results: list[str] = []
    matched = _RESULTS.match(body)
    if matched:
        for name in matched.group(1).split(", "):
            base, _, count = name.partition(":")
            results += [f"{base}#{i}" for i in range(int(count))] if count else [base]
        body = matched.group(2)
    name = body.split(" ")[0].split("(")[0].strip('"')
    operation = Operation(name, body, _VALUE.findall(body), results)
    operation.location = locations.get(where[0], "") if where else ""
    if name.endswith((".yield", ".return", ".condition")):
        if open_regions:
            open_regions[-1].yields.append(operation.operands)
        return
    function.operations.append(operation)
    for result in results:
        function.made_by[result] = operation
    if name == "scf.for":
        function.made_by[operation.operands[0]] = BlockArgument(operation, "induction")
    if name in ("scf.for", "scf.while"):
        for position, (inner, initial) in enumerate(_ITER_ARG.findall(_carried(body))):
            argument = BlockArgument(operation, "carried", position, initial)
            function.made_by[inner] = argument
    if body.endswith("{"):
        open_regions.append(operation)


def _carried(body: str) -> str:
    """The part of a loop's line that lists what goes from one turn to the next."""
    if body.startswith("scf.while"):
        return body
    return body.partition("iter_args")[2]


def _close(line: str, open_regions: list[Operation], locations: dict[str, str]) -> None:
    if line.endswith("{"):  # "} else {" and "} do {" go on with the same operation
        return
    if not open_regions:
        return
    operation = open_regions.pop()
    where = re.findall(r"loc\((#loc\d*)\)$", line)
    if where:
        operation.location = locations.get(where[0], "")
    if ") -> " in line:  # a reduction's types stand behind its region
        operation.text += " " + _LOCATION.sub("", line).lstrip("} ")


def _locations(text: str) -> dict[str, str]:
    """``#locN`` to ``file.py:line``; of inlined code the line inside the called function."""
    direct: dict[str, str] = {}
    through: dict[str, str] = {}
    for name, rest in re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE):
        place = re.match(r'"([^"]*)":(\d+):\d+', rest)
        if place:
            direct[name] = f"{place.group(1).rsplit('/', 1)[-1]}:{place.group(2)}"
            continue
        inner = re.search(r"#loc\d*", rest)
        if inner:
            through[name] = inner.group(0)
    for name in through:
        target, seen = name, 0
        while target in through and seen < 20:
            target, seen = through[target], seen + 1
        if target in direct:
            direct[name] = direct[target]
    return direct
