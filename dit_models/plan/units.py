"""The model as the pieces that ``fully_shard`` gathers and frees: which parameters, how divided."""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import nn

import moe_kernels as mk
from dit_models.block import DiTBlock
from dit_models.model_config import ModelConfig
from dit_models.models import build_model
from dit_models.plan.mesh import Mesh

FP32 = 4

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together.

    Attributes:
        shapes: of the parameters that its processes divide by rows of the first dimension.
        experts: of those of experts, after their owners have taken theirs, each divided by the
            first dimension that comes out even.
        shards: processes that divide them.
        stride: ranks between two of these.
        reduced: gathered in the dtype of the products, not in fp32.
        stays: gathered from the forward to the backward, because it is small.
    """

    shapes: Shapes
    shards: int
    stride: int
    experts: Shapes = ()
    reduced: bool = True
    stays: bool = False

    @cached_property
    def numel(self) -> int:
        """Values in all, without padding."""
        return sum(math.prod(shape) for shape in self.shapes + self.experts)

    @cached_property
    def shard_numel(self) -> int:
        """Values that one process keeps, rounded up (as rank 0)."""
        rows = sum(_part(shape, 0, self.shards) for shape in self.shapes)
        return rows + sum(_part(s, _cut(s, self.shards), self.shards) for s in self.experts)

    @cached_property
    def gathered_numel(self) -> int:
        """Values of the gathered unit, padding included: it travels and takes memory too."""
        return self.shard_numel * self.shards

    @cached_property
    def rearranged(self) -> tuple[int, ...]:
        """Values of each parameter that is not divided by its first dimension, in their order.

        ``fully_shard`` sends parts one behind the other: it copies such a parameter's parts once
        more after they came, and its gradient before it goes.
        """
        return tuple(math.prod(s) for s in self.experts if _cut(s, self.shards))


@dataclass(frozen=True)
class BlockUnits:
    """Of one transformer block, in the order of the forward pass.

    Attributes:
        dense: what is not an expert (with ``expert`` = 1 the experts too).
        slot: values of ``dense`` that belong to the FFN slot.
        router: of a MoE block, else ``None``.
        experts: of a MoE block whose experts have several owners, else ``None``.
    """

    dense: Unit
    slot: int
    router: Unit | None = None
    experts: Unit | None = None

    @property
    def all(self) -> tuple[Unit, ...]:
        """Those that exist."""
        return tuple(u for u in (self.dense, self.router, self.experts) if u is not None)


@dataclass(frozen=True)
class ModelUnits:
    """Of a model.

    Attributes:
        blocks: the transformer blocks.
        rest: embeddings and final layer.
        final: values of ``rest`` that belong to the final layer.
    """

    blocks: tuple[BlockUnits, ...]
    rest: Unit
    final: int

    @property
    def all(self) -> tuple[Unit, ...]:
        """Every unit."""
        return (*(unit for block in self.blocks for unit in block.all), self.rest)


def model_units(config: ModelConfig, mesh: Mesh) -> ModelUnits:
    """Divide a model as ``dit_models.parallel.shard`` does; nothing is allocated."""
    shapes = _shapes_of(config)
    made = {kind: _block_units(kind, mesh) for kind in set(shapes.blocks)}
    rest = Unit(shapes.rest, mesh.dense_shards, 1, reduced=False)
    return ModelUnits(tuple(made[kind] for kind in shapes.blocks), rest, shapes.final)


@dataclass(frozen=True)
class _BlockShapes:
    slot: Shapes  # of the FFN slot, beside what follows
    others: Shapes
    router: Shapes = ()
    experts: Shapes = ()


@dataclass(frozen=True)
class _ModelShapes:
    blocks: tuple[_BlockShapes, ...]
    rest: Shapes
    final: int
    products: int  # values of the matrices that autocast copies into the products' dtype


@lru_cache(maxsize=32)
def _shapes_of(config: ModelConfig) -> _ModelShapes:
    model = build_model(config, device="meta")
    rest = _without(list(model.parameters()), list(model.blocks.parameters()))
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    for module in model.modules():
        if isinstance(module, mk.GroupedExperts):
            matrices.extend(module.parameters())
    blocks = tuple(_block_shapes(block) for block in model.blocks)
    final = sum(p.numel() for p in model.final_layer.parameters())
    return _ModelShapes(blocks, _shapes(rest), final, sum(p.numel() for p in matrices))


def _block_shapes(block: nn.Module) -> _BlockShapes:
    assert isinstance(block, DiTBlock)
    slot = list(block.ffn.parameters())
    others = _shapes(_without(list(block.parameters()), slot))
    if not isinstance(block.ffn, mk.MoE):
        return _BlockShapes(_shapes(slot), others)
    routers = list(block.ffn.router.parameters())
    experts = list(block.ffn.experts.parameters())
    shared = _without(slot, routers + experts)
    return _BlockShapes(_shapes(shared), others, _shapes(routers), _shapes(experts))


def product_weights(config: ModelConfig) -> int:
    """Values of the matrices that autocast copies into the products' dtype, in one process."""
    return _shapes_of(config).products


def _block_units(shapes: _BlockShapes, mesh: Mesh) -> BlockUnits:
    router = None
    if shapes.router:
        router = Unit(shapes.router, mesh.dense_shards, 1, reduced=False, stays=True)
    within, experts = shapes.experts, None
    if mesh.expert > 1 and shapes.experts:
        owned = tuple((shape[0] // mesh.expert, *shape[1:]) for shape in shapes.experts)
        within, experts = (), Unit((), mesh.expert_shards, mesh.expert, owned)
    dense = Unit(shapes.slot + shapes.others, mesh.dense_shards, 1, within)
    return BlockUnits(dense, sum(map(math.prod, shapes.slot + within)), router, experts)


def _shapes(parameters: list[nn.Parameter]) -> Shapes:
    return tuple(tuple(p.shape) for p in parameters)


def _without(parameters: list[nn.Parameter], others: list[nn.Parameter]) -> list[nn.Parameter]:
    ids = {id(other) for other in others}
    return [p for p in parameters if id(p) not in ids]


def _cut(shape: tuple[int, ...], shards: int) -> int:
    """The dimension by which an expert parameter is divided: experts, rows or columns."""
    return next((dim for dim, size in enumerate(shape) if size % shards == 0), 0)


def _part(shape: tuple[int, ...], dim: int, shards: int) -> int:
    return math.prod(shape) // shape[dim] * -(-shape[dim] // shards)
