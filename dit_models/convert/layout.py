"""How tensors of ours are made of tensors of another format: bytes put one after another.

Every format here stores the same numbers in the same order inside a tensor; only names, shapes and
what is joined differ. So a conversion moves bytes and its inverse gives the same bits.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from dit_models.model_config import ModelConfig
from dit_models.models import build_model
from dit_models.tensor_files import StoredTensor, TensorEntry, check_names


class Piece(NamedTuple):
    """A tensor of the other format."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A whole checkpoint of another format.

    Attributes:
        pieces: for each tensor of ours, what its bytes are made of, in order.
        copies: tensors of the other format that repeat another one: name -> name of the original.
        positions: name and shape of the stored positions, which we compute; ``None`` where the
            format computes them, too.
    """

    pieces: dict[str, tuple[Piece, ...]]
    copies: dict[str, str] = field(default_factory=dict)
    positions: Piece | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that a file of this format has."""
        shapes = {piece.name: piece.shape for parts in self.pieces.values() for piece in parts}
        shapes |= {copy: shapes[original] for copy, original in self.copies.items()}
        if self.positions is not None:
            shapes[self.positions.name] = self.positions.shape
        return shapes


Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Format:
    """A format of others.

    Attributes:
        name: its name in commands and in ``conversion.json``.
        title: what it is, for people.
        recognises: whether tensors with these names are of this format.
        describe: tensors, diffusers config and known head count -> our configuration, and what
            else must be known to write the format again (JSON values).
        layout: our configuration and that knowledge -> the layout.
        default_variant: the knowledge for a model that never was in this format.
    """

    name: str
    title: str
    recognises: Callable[[Tensors], bool]
    describe: Callable[[Tensors, dict[str, Any], "Choices"], tuple[ModelConfig, dict[str, Any]]]
    layout: Callable[[ModelConfig, dict[str, Any]], Layout]
    default_variant: Callable[[ModelConfig], dict[str, Any]]


@dataclass(frozen=True)
class Choices:
    """What the weights do not say; ``None`` takes what the published models have."""

    num_heads: int | None = None
    top_k: int | None = None
    time_frequency_shift: int | None = None


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a model of ours."""
    state = build_model(config, device="meta").state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def check_source(tensors: Tensors, layout: Layout, where: str) -> None:
    """Check that a file has exactly the tensors of its format, in the right shapes and dtypes.

    Raises:
        ValueError: lists what is missing, unknown, of another shape, or of mixed dtypes.
    """
    expected = layout.shapes()
    check_names(tensors, expected, where)
    wrong = [
        f"{name} {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if tensors[name].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"{where}: tensors of another shape than the rest says: {', '.join(wrong)}."
        )
    for name, parts in layout.pieces.items():
        dtypes = {tensors[piece.name].dtype for piece in parts}
        if len(dtypes) > 1:
            raise ValueError(
                f"{where}: the parts of {name} ({parts[0].name}, ...) have different dtypes "
                f"({', '.join(sorted(map(str, dtypes)))}); expected one."
            )


def check_copies(tensors: Tensors, layout: Layout, where: str) -> None:
    """Check that tensors which the format repeats are equal, bit for bit.

    Raises:
        ValueError: names the first that differ.
    """
    different = [
        f"{copy} and {original}"
        for copy, original in layout.copies.items()
        if tensors[copy].dtype != tensors[original].dtype
        or any(
            a != b for a, b in zip(tensors[copy].blocks(), tensors[original].blocks(), strict=True)
        )
    ]
    if different:
        raise ValueError(
            f"{where}: DiT has one timestep and one label embedding for all blocks, and diffusers "
            f"keeps a copy in each; here they differ, so this model is no DiT: {different[0]}"
            f" and {len(different) - 1} more pairs. It was probably trained in diffusers from "
            "scratch and cannot be converted."
        )


def joined(tensors: Tensors, layout: Layout, config: ModelConfig) -> dict[str, TensorEntry]:
    """Our tensors as entries that read the pieces when written."""
    shapes = our_shapes(config)
    check_names(layout.pieces, shapes, "layout")
    entries = {}
    for name, shape in shapes.items():
        parts = [tensors[piece.name] for piece in layout.pieces[name]]
        entry = TensorEntry(parts[0].dtype, shape, partial(_blocks, parts))
        assert entry.num_bytes == sum(part.num_bytes for part in parts), name
        entries[name] = entry
    return entries


def _blocks(parts: list[StoredTensor]) -> Iterator[bytes]:
    for part in parts:
        yield from part.blocks()


def separated(ours: Tensors, layout: Layout) -> dict[str, StoredTensor]:
    """The other format's tensors as ranges of our files."""
    pieces: dict[str, StoredTensor] = {}
    for name, parts in layout.pieces.items():
        stored = ours[name]
        start = stored.start
        for piece in parts:
            part = StoredTensor(stored.path, start, stored.dtype, piece.shape)
            pieces[piece.name] = part
            start += part.num_bytes
        assert start == stored.start + stored.num_bytes, name
    for copy, original in layout.copies.items():
        pieces[copy] = pieces[original]
    return pieces


def require_names(tensors: Tensors, names: list[str], what: str) -> None:
    """Raise ValueError unless the tensors that the sizes are read from are there."""
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"{what} lacks {', '.join(missing)}; the file is not complete.")


def number_of(names: Tensors, prefix: str) -> int:
    """How many numbered modules ``prefix0.``, ``prefix1.``, ... there are (the highest plus 1)."""
    numbers = [name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)]
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1


def is_float(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be computed with."""
    return dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
