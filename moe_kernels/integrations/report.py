"""What a swap did, module by module, and the errors it raises."""

from dataclasses import dataclass, field


class NothingMatched(ValueError):
    """No module of the model is a block that can be served."""


class VerificationFailed(RuntimeError):
    """A swapped block computed something else than the original; the swap was taken back."""


@dataclass(frozen=True)
class SwapRow:
    """One module.

    Attributes:
        path: where it is in the model; ``""`` for the model itself.
        class_name: of the original.
        family: whose block it is, e.g. ``"HiDream-I1"``; ``""`` when no adapter knows the class.
        status: ``"swapped"``, ``"already swapped"``, ``"skipped"`` or ``"reverted"``.
        detail: the reason of a skip, else what the block is made of.
        output_error, gradient_error: of ``verify=True``: largest error against the original in fp64
            over the largest error allowed, so 1 is the limit; ``None`` where not compared.
    """

    path: str
    class_name: str
    family: str
    status: str
    detail: str = ""
    output_error: float | None = None
    gradient_error: float | None = None


@dataclass
class SwapReport:
    """The result of ``moe_kernels.apply`` or ``revert``; ``print(report)`` shows a table.

    Attributes:
        rows: a ``SwapRow`` for each module that an adapter knows.
        backend: the backend that was asked for.
    """

    backend: str = "auto"
    rows: list[SwapRow] = field(default_factory=list)

    def paths(self, *statuses: str) -> list[str]:
        """Paths of the modules with one of these statuses."""
        return [row.path for row in self.rows if row.status in statuses]

    @property
    def swapped(self) -> list[str]:
        """Paths of the modules that run on the kernels now."""
        return self.paths("swapped", "already swapped")

    @property
    def skipped(self) -> list[str]:
        """Paths of the modules that an adapter knows but could not serve."""
        return self.paths("skipped")

    @property
    def reverted(self) -> list[str]:
        """Paths of the modules that are the original class again."""
        return self.paths("reverted")

    def __str__(self) -> str:
        counts = dict.fromkeys(("swapped", "already swapped", "skipped", "reverted"), 0)
        for row in self.rows:
            counts[row.status] += 1
        told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        lines = [f"moe_kernels (backend {self.backend}): {told or 'no module'}"]
        verified = any(row.output_error is not None for row in self.rows)
        head = ["module", "class", "family", "status"]
        head += ["output error", "gradient error"] if verified else []
        table = [[*head, "detail"]]
        for row in self.rows:
            cells = [row.path or "(the model)", row.class_name, row.family, row.status]
            if verified:
                errors = (row.output_error, row.gradient_error)
                cells += ["-" if error is None else f"{error:.2f}" for error in errors]
            table.append([*cells, row.detail])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for cells in table:
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            lines.append("  " + "  ".join(padded).rstrip())
        if verified:
            lines.append("  errors are in units of the largest error allowed")
        return "\n".join(lines)
