"""Memory of one process through a step: the parts of what it holds at the fullest moment.

A step is followed block by block through the backward pass, where activations shrink while
gradients grow. The moments are: the backward of a block's FFN slot, of its attention, the reduction
of its gradients, and the optimizer's step. What is said is the fullest of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import accumulate

from dit_models.plan.activations import (
    Widths,
    model_activations,
    rest_activations,
)
from dit_models.plan.mesh import Mesh
from dit_models.plan.settings import Run
from dit_models.plan.units import (
    FP32,
    ModelUnits,
    Unit,
    model_units,
    product_weights,
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process (rank 0, whose parts are never smaller than others').

    Attributes:
        parameters: its part of the parameters, fp32.
        optimizer: its part of the optimizer's state, fp32.
        ema: its part of the averaged weights, fp32.
        gradients: its part of the gradients, fp32, as far as they exist at that moment.
        gathered: weights gathered for products, with those of the next unit on their way, and
            with bf16 in one process the copies in bf16.
        unreduced: gradients of gathered weights, and the buffers of their reduction.
        activations: kept for the backward, and its temporaries.
        moment: when that is.
    """

    parameters: int = 0
    optimizer: int = 0
    ema: int = 0
    gradients: int = 0
    gathered: int = 0
    unreduced: int = 0
    activations: int = 0
    moment: str = ""

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(value for value in self.parts().values())

    def parts(self) -> dict[str, int]:
        """The parts by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "moment"}


def plan_memory(run: Run, mesh: Mesh, recompute: bool = False) -> Memory:
    """The fullest moment of a training step, from the second step on.

    Args:
        run: what is trained.
        mesh: how processes are divided.
        recompute: activation checkpointing of every block.
    """
    units = model_units(run.model, mesh)
    held = sum(unit.shard_numel for unit in units.all) * FP32
    always = Memory(parameters=held, optimizer=2 * held, ema=held if run.ema else 0)
    moments = _Backward(run, mesh, recompute, units, always).moments()
    return max((*moments, _optimizer_step(run, always, held)), key=lambda moment: moment.total)


def _optimizer_step(run: Run, always: Memory, held: int) -> Memory:
    # RMSprop's square roots are a tensor each; the fused AdamW has none.
    temporary = held if run.optimizer == "rmsprop" else 0
    return replace(always, gradients=held, unreduced=temporary, moment="the optimizer's step")


class _Backward:
    """One backward pass, last block first."""

    def __init__(
        self, run: Run, mesh: Mesh, recompute: bool, units: ModelUnits, always: Memory
    ) -> None:
        self.run, self.units, self.always, self.recompute = run, units, always, recompute
        widths = Widths(run, mesh.expert)
        self.blocks = model_activations(widths)
        kept = (block.kept(recompute) for block in self.blocks)
        self.before = list(accumulate(kept, initial=0))
        self.rest = rest_activations(widths)
        self.stream = widths.tokens * run.model.hidden_size * FP32  # gradient between blocks
        self.divided = mesh.gpus > 1
        self.final = units.final * FP32
        copies = 0 if self.divided or not widths.casts else product_weights(run.model)
        self.copies = copies * run.product_bytes

    def moments(self) -> Iterator[Memory]:
        """What is held, moment by moment."""
        grows = self.run.accumulate == 1
        # Gradients of earlier micro-batches stay where they are.
        done = 0 if grows else self.always.parameters
        last = 0  # what the reduction before this moment still holds
        rest = self._bytes(self.units.rest) if self.divided else 0
        kept = self.before[-1] + self.rest + self.stream
        gathered = rest + self._stays(len(self.blocks) - 1) if self.divided else self.copies
        yield replace(
            self.always,
            gradients=done,
            gathered=gathered,
            activations=kept,
            moment="the final layer's backward",
        )
        for index in reversed(range(len(self.blocks))):
            units = self.units.blocks[index]
            kept = self._kept(index)
            yield from self._of_block(index, done, kept, last)
            last = self._sent(units.dense)
            if grows:
                done += sum(unit.shard_numel for unit in units.all) * FP32
        if self.divided:
            yield replace(
                self.always,
                gradients=done,
                gathered=2 * rest,
                unreduced=rest + max(self._reduction(self.units.rest), last),
                activations=self.stream,
                moment="the embeddings' backward",
            )

    def _kept(self, index: int) -> int:
        """Activations beside the block's own, and the gradient of its output."""
        earlier = self.before[index]
        again = self.blocks[index].routing if self.recompute else 0
        return earlier + again + self.stream

    def _of_block(self, index: int, done: int, kept: int, last: int) -> Iterator[Memory]:
        units, block = self.units.blocks[index], self.blocks[index]
        previous = self.units.blocks[index - 1].dense if index else None
        dense, experts = self._gathered(units.dense), self._gathered(units.experts)
        ahead = self._gathered(previous)
        # The root is reduced last: its weights and the final layer's gradients stay till then.
        stays = self._stays(index) + self._gathered(self.units.rest)
        slot = units.slot * self._width(units.dense)
        if units.experts is not None:
            slot += self._bytes(units.experts)

        def at(moment: str, gathered: int, gradients: int, buffers: int, own: int) -> Memory:
            return replace(
                self.always,
                gradients=done + (0 if self.divided else gradients),
                gathered=gathered + stays if self.divided else self.copies,
                unreduced=self.final + gradients + buffers if self.divided else 0,
                activations=kept + own,
                moment=f"{moment} of block {index}",
            )

        # A gathered unit is copied out of the buffer that it came in.
        copied = max(dense + self._copied(units.dense), experts + self._copied(units.experts))
        yield at("the gathering", dense + experts + copied, 0, last, block.saved)
        during = block.saved - self.stream + block.ffn_backward
        # The next block is on its way once the router's backward, or a dense block's, begins.
        gathered = dense + experts + (0 if units.router else ahead)
        yield at("the FFN's backward", gathered, slot, last, during)
        if units.experts is not None:
            buffers = self._reduction(units.experts)
            yield at("the experts' reduction", dense, slot, buffers, block.attention + self.stream)
            last = self._sent(units.experts)
        gradients = self._bytes(units.dense)
        yield at("the attention's backward", dense + ahead, gradients, last, block.attention)
        buffers = self._reduction(units.dense)
        yield at("the reduction", ahead, gradients, buffers, 0)

    def _gathered(self, unit: Unit | None) -> int:
        return 0 if unit is None or not self.run.reshard_after_forward else self._bytes(unit)

    def _copied(self, unit: Unit | None) -> int:
        """Parts in the order that they came in, before they are put together."""
        if unit is None or not self.run.reshard_after_forward:
            return 0
        return sum(unit.rearranged) * self._width(unit)

    def _stays(self, index: int) -> int:
        """Weights that stay gathered from the forward to this block's backward."""
        blocks = self.units.blocks[: index + 1]
        if self.run.reshard_after_forward:
            return sum(self._bytes(block.router) for block in blocks if block.router)
        return self._bytes(self.units.rest) + sum(self._bytes(u) for b in blocks for u in b.all)

    def _width(self, unit: Unit) -> int:
        return self.run.product_bytes if unit.reduced and self.divided else FP32

    def _bytes(self, unit: Unit) -> int:
        return unit.gathered_numel * self._width(unit)

    def _sent(self, unit: Unit) -> int:
        """The buffer that a reduce-scatter reads, in fp32; it stays until the next one."""
        return unit.gathered_numel * FP32 if self.divided else 0

    def _reduction(self, unit: Unit) -> int:
        """That buffer, its result, and the last gradient whose parts were put in order for it."""
        if not self.divided:
            return 0
        kept = sum(unit.rearranged[-1:]) * self._width(unit)
        return self._sent(unit) + unit.shard_numel * FP32 + kept
