"""What ``upcycle`` did, block by block."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BlockReport:
    """One block of the model.

    Attributes:
        path: of the module in the model.
        class_name: of the dense block.
        activation: of the experts, ``""`` for a skipped block.
        skipped: why the block stayed as it was; ``None`` for an upcycled one.
        parameters_before, parameters_after: numbers held by the block.
        activated_before, activated_after: of these, how many an average token passes.
        difference: largest absolute difference between the outputs of the dense and the upcycled
            block on random tokens, over the largest dense output; ``None`` when not measured.
    """

    path: str
    class_name: str
    activation: str = ""
    skipped: str | None = None
    parameters_before: int = 0
    parameters_after: int = 0
    activated_before: int = 0
    activated_after: int = 0
    difference: float | None = None


@dataclass(frozen=True)
class UpcycleReport:
    """What ``upcycle`` did; ``print`` it for a table.

    Attributes:
        recipe: the recipe in words.
        blocks: every module that looks like a dense MLP, in the order of ``named_modules``.
    """

    recipe: str
    blocks: tuple[BlockReport, ...] = field(default_factory=tuple)

    @property
    def upcycled(self) -> tuple[BlockReport, ...]:
        """The blocks that were replaced."""
        return tuple(block for block in self.blocks if block.skipped is None)

    @property
    def skipped(self) -> tuple[BlockReport, ...]:
        """The blocks that stayed dense."""
        return tuple(block for block in self.blocks if block.skipped is not None)

    @property
    def max_difference(self) -> float | None:
        """Largest measured ``difference``; ``None`` when none was measured."""
        measured = [block.difference for block in self.upcycled if block.difference is not None]
        return max(measured, default=None)

    def __str__(self) -> str:
        head = f"upcycled {len(self.upcycled)} of {len(self.blocks)} dense MLPs: {self.recipe}"
        lines = [head, *_table(self.blocks)]
        total = [sum(getattr(b, name) for b in self.upcycled) for name in _COUNTS]
        lines.append(
            f"total: {_count(total[0])} -> {_count(total[1])} parameters, "
            f"{_count(total[2])} -> {_count(total[3])} of them activated by a token"
        )
        return "\n".join(lines)


_COUNTS = ("parameters_before", "parameters_after", "activated_before", "activated_after")


def _table(blocks: tuple[BlockReport, ...]) -> list[str]:
    """Lines of a table with one row a block."""
    rows = [("block", "class", "activation", "parameters", "activated", "difference")]
    for block in blocks:
        if block.skipped is not None:
            rows.append((block.path, block.class_name, f"skipped: {block.skipped}", "", "", ""))
            continue
        difference = "not measured"
        if block.difference is not None:
            difference = f"{block.difference:.1e}" if block.difference else "0"
        rows.append(
            (
                *(block.path, block.class_name, block.activation),
                f"{_count(block.parameters_before)} -> {_count(block.parameters_after)}",
                f"{_count(block.activated_before)} -> {_count(block.activated_after)}",
                difference,
            )
        )
    # A reason may be long: it runs over the columns of numbers, which it leaves empty.
    full = [row for row in rows if row[3]]
    widths = [max(len(row[i]) for row in (rows if i < 2 else full)) for i in range(6)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _count(number: int) -> str:
    """1234567 as 1.23 M."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
