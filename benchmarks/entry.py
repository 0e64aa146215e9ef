"""What the suite is made of: an entry (data), a stage (inputs, truth, providers), a provider."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

MODES = ("forward", "backward", "both")
CPU = torch.device("cpu")
# Ours by one backend each, in entries for a GPU: the resolver's choice follows from their times.
OURS_CUDA, OURS_TRITON = "ours:cuda", "ours:triton"
BY_BACKEND = (OURS_CUDA, OURS_TRITON)

Shape = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """What is wanted of ours against one provider.

    Attributes:
        mode: one of ``MODES``; ``"memory"`` is the peak, ``"saved"`` what is kept for backward.
        against: name of the provider.
        at_least: wanted other/ours, or ``None``.
        at_most: wanted ours/other, or ``None``; exactly one of the two is given.
    """

    mode: str
    against: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, ratio: float) -> bool:
        """Say whether a measured other/ours reaches the goal."""
        if self.at_least is not None:
            return ratio >= self.at_least
        assert self.at_most is not None
        return 1 / ratio <= self.at_most

    def words(self) -> str:
        """``>= 2.8x`` (other/ours) or ``<= 0.5 of it`` (ours/other)."""
        return f">= {self.at_least:g}x" if self.at_least else f"<= {self.at_most:g} of it"


@dataclass(frozen=True)
class FigureGoal:
    """What is wanted of a measured figure itself, on a GPU.

    Attributes:
        figure: its name, see ``benchmarks.gpu.figures``.
        at_least, at_most: wanted value; exactly one of the two is given.
    """

    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, value: float) -> bool:
        """Say whether a measured value reaches the goal."""
        if self.at_least is not None:
            return value >= self.at_least
        assert self.at_most is not None
        return value <= self.at_most

    def words(self) -> str:
        """``>= 400`` or ``<= 8``."""
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


@dataclass(frozen=True)
class Axis:
    """Where an entry stands in a series, which is every entry with the first word of its name.

    Attributes:
        name: ``"tokens"``, ``"images"``, ``"experts"``, ``"capacity"`` or ``"width"``.
        value: the size that varies; everything else is the same along the series.
    """

    name: str
    value: float


@dataclass(frozen=True)
class Entry:
    """One row of the suite, as data.

    Attributes:
        name: ``stage/shape words``.
        stage: key of ``benchmarks.stages.STAGES``.
        shape: sizes that the stage's input maker reads.
        tiny: the same keys, small, for the smoke suite.
        modes: which of ``MODES`` are timed.
        providers: which providers of the stage take part; ``"ours"`` among them.
        goals: ratios wanted on an idle machine.
        dtype: of the tokens and weights; routing is in fp32 in every provider.
        memory: providers whose peak memory is measured.
        figures: wanted figures of a GPU.
        axis: place in a series; ``None`` outside of one.
    """

    name: str
    stage: str
    shape: Shape
    tiny: Shape
    modes: tuple[str, ...]
    providers: tuple[str, ...]
    goals: tuple[Goal, ...] = ()
    dtype: str = "float32"
    memory: tuple[str, ...] = ()
    figures: tuple[FigureGoal, ...] = ()
    axis: Axis | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True)
class Inputs:
    """What all providers of an entry share.

    Attributes:
        leaves: tensors that gradients are taken for, by name.
        upstream: random gradients of the differentiable outputs, by name.
        fixed: tensors, plans and numbers without gradient.
    """

    leaves: dict[str, Tensor]
    upstream: dict[str, Tensor]
    fixed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A provider bound to its inputs.

    Attributes:
        call: computes the outputs, the differentiable ones first; without gradients it may leave
            out what only training needs.
        outputs: names of what ``call`` returns.
        leaves: tensors that gradients are taken for; several under one name are the parts of the
            shared tensor along its first dimension, in order.
        canonical: puts outputs and gradients (``d<leaf>``) into the layout of the truth before they
            are compared (not timed); by default they are in it.
    """

    call: Callable[[], tuple[Tensor, ...]]
    outputs: tuple[str, ...]
    leaves: dict[str, list[Tensor]]
    canonical: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda named: named

    @property
    def flat_leaves(self) -> list[Tensor]:
        """Every leaf, in the order of the names."""
        return [leaf for leaves in self.leaves.values() for leaf in leaves]


@dataclass(frozen=True)
class Provider:
    """One way of computing a stage.

    Attributes:
        build: binds it to inputs.
        summary: one line for the tables' legend.
        kind: ``"ours"``, ``"backend"`` (ours by one backend, left out where that cannot serve),
            ``"plain"`` (an alternative), or ``"limit"`` (another function with the same activated
            FLOPs: timed, not compared).
        compiled: whether it needs ``torch.compile``.
        forward_only: whether only its forward is comparable.
        library: whether the code is another library's: ours is not held to its error.
    """

    build: Callable[[Inputs], Run]
    summary: str
    kind: str = "plain"
    compiled: bool = False
    forward_only: bool = False
    library: bool = False


@dataclass(frozen=True)
class Cost:
    """Arithmetic and smallest possible memory traffic of one call."""

    flops: float
    bytes: float


class InputMaker(Protocol):
    """Shape, dtype and device to ``Inputs``; other seeds give other random numbers."""

    def __call__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0
    ) -> Inputs: ...


@dataclass(frozen=True)
class Stage:
    """How to make inputs, the truth and the providers of one kind of entry.

    Attributes:
        make_inputs: shape, dtype, device and seed to ``Inputs``.
        expected: outputs by name from fp64 inputs, as slow and plain as possible.
        providers: by name.
        cost: shape, bytes per element and mode to ``Cost``.
    """

    make_inputs: InputMaker
    expected: Callable[[Inputs], dict[str, Tensor]]
    providers: dict[str, Provider]
    cost: Callable[[Shape, int, str], Cost]
