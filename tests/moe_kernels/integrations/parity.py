"""A block of another package before and after the swap, whatever its arguments.

A ``Family`` says how to make the block and what it takes; ``contract.py`` holds what every family
has to fulfil.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.integrations.fp64 import in_fp64
from moe_kernels.integrations.swapped import Swapped

from .blocks import CLEAR, Results

Inputs = tuple[Tensor, ...]
Ranking = tuple[Tensor, int]
CLEAR_IN_FP32 = 1e-4


def _serves(name: str) -> bool:
    return BACKENDS[name].why_not("expert_mlp", "cpu") is None


# The swapped blocks run on the compiled kernels where there are any.
FAST = "cpu" if _serves("cpu") else "reference"


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    """Replaces the one that runs every test on every backend."""
    torch._dynamo.reset()
    with mk.use_backend(FAST):
        yield FAST


def on_backends(*names: str) -> list[Any]:
    """Parameters of a test: these backends; those that cannot serve here are skipped."""
    params = []
    for name in names:
        reason = BACKENDS[name].why_not("expert_mlp", "cpu")
        marks = [] if reason is None else [pytest.mark.skip(reason=f"the {name} backend {reason}")]
        params.append(pytest.param(name, marks=marks))
    return params


@dataclass(frozen=True)
class Family:
    """Blocks of one class.

    Attributes:
        name: in the names of tests.
        build: makes a block in fp32, its weights uninitialised or not.
        draw: random arguments for (batch size, sequence length).
        rankings: what routes with these arguments: of each ranking the affinities, and how many of
            the last dimension are taken. None where the choice is an argument.
        graph_breaks: of the original in training, at the least: a first compilation in a process
            may count one more.
        weight_scale: standard deviation of all parameters.
        differentiable_in_eval: whether the original is.
        works_under_autocast: whether the original does.
    """

    name: str
    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator, int, int], Inputs]
    rankings: Callable[[Any, Inputs], list[Ranking]] = lambda block, inputs: []
    graph_breaks: int = 0
    weight_scale: float = 0.4
    differentiable_in_eval: bool = True
    works_under_autocast: bool = True

    def make(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """An original block; its weights are numbers that every dtype has."""
        block = self.build()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in block.parameters():
                numbers = torch.randn(parameter.shape, generator=generator) * self.weight_scale
                parameter.copy_(numbers.bfloat16())
        return block.to(dtype)

    def inputs(
        self,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 2,
        seq_len: int = 8,
        seed: int = 0,
    ) -> Inputs:
        """Arguments of ``make()`` that leave no doubt about the routing in this dtype."""
        rounding = dtype if dtype.itemsize == 2 else None
        return cast(_clear_inputs(self, rounding, batch_size, seq_len, seed), dtype)


@cache
@torch.no_grad()
def _clear_inputs(
    family: Family,
    rounding: torch.dtype | None,
    batch_size: int,
    seq_len: int,
    seed: int,
    tries: int = 3000,
) -> Inputs:
    block, rounded = _originals(family, rounding)
    for attempt in range(tries):
        generator = torch.Generator().manual_seed(tries * seed + attempt)
        drawn = family.draw(generator, batch_size, seq_len)
        drawn = cast(cast(drawn, torch.bfloat16), torch.float64)
        rankings = family.rankings(block, drawn)
        clear = CLEAR_IN_FP32 if rounding is None else CLEAR
        if any(_margin(*ranking) <= clear for ranking in rankings):
            continue
        if rounding is None or all(
            map(_chooses_alike, rankings, family.rankings(rounded, cast(drawn, rounding)))
        ):
            return drawn
    raise AssertionError(f"no clear arguments of {family.name} in {tries} tries")


@cache
def _originals(family: Family, rounding: torch.dtype | None) -> tuple[nn.Module, nn.Module | None]:
    """In fp64, and rounded."""
    return exact_copy(family.make()), None if rounding is None else family.make(rounding)


def _margin(affinity: Tensor, taken: int) -> float:
    """Relative distance of the last one taken from the first not taken, at the least."""
    if taken == affinity.shape[-1]:
        return 1.0
    ranked = affinity.sort(dim=-1, descending=True).values
    return float((1 - ranked[..., taken] / ranked[..., taken - 1]).min())


def _chooses_alike(ranking: Ranking, rounded: Ranking) -> bool:
    """Whether the same ones are taken when rounded, where none may be tied."""
    chosen, chosen_by_other = (
        affinity.topk(taken).indices.sort().values for affinity, taken in (ranking, rounded)
    )
    return torch.equal(chosen, chosen_by_other) and _margin(*rounded) > 0


def cast(tensors: Inputs, dtype: torch.dtype) -> Inputs:
    """The same with every floating-point tensor in this dtype."""
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def swapped_copy(module: nn.Module, backend: str = "auto") -> nn.Module:
    """A copy of a block or model whose blocks all run on the kernels."""
    twin = copy.deepcopy(module)
    report = mk.apply(twin, backend)
    assert report.swapped, report
    assert not report.skipped, report
    return twin


def swapped_blocks(module: nn.Module) -> list[Any]:
    """The blocks that run on the kernels."""
    return [block for block in module.modules() if isinstance(block, Swapped)]


def exact_copy(block: nn.Module) -> nn.Module:
    """The original in fp64."""
    exact = in_fp64(block)
    for module in exact.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation_internal"):
            config._experts_implementation_internal = "eager"  # the others have no fp64
    return exact


def random_like(out: Tensor, seed: int = 3) -> Tensor:
    """An upstream gradient in fp64, the same for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64)


def first_tensor(out: Any) -> Tensor:
    """The result of a block or model."""
    if isinstance(out, Tensor):
        return out
    return first_tensor(next(iter(out.values())) if isinstance(out, dict) else out[0])


def run(
    module: Any, inputs: Inputs, *, gradients: bool = True, upstream: Tensor | None = None
) -> Results:
    """``"out"`` and the gradients of every floating-point argument and every parameter.

    Args:
        module: a block or model, compiled or not; what does not count for the output is left out.
        inputs: its arguments, used as they are: strides count.
        gradients: whether to differentiate.
        upstream: gradient of the output; random by default.
    """
    inputs = tuple(t.detach().requires_grad_(gradients and t.is_floating_point()) for t in inputs)
    with torch.set_grad_enabled(gradients):
        out = first_tensor(module(*inputs))
    found = {"out": out.detach().clone()}
    if not gradients:
        return found
    if upstream is None:
        upstream = random_like(out)
    leaves = {f"argument {i}": t for i, t in enumerate(inputs) if t.requires_grad}
    leaves |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    values = torch.autograd.grad(
        out, list(leaves.values()), upstream.to(out.dtype), allow_unused=True
    )
    return found | {
        name: value for name, value in zip(leaves, values, strict=True) if value is not None
    }


def original_results(family: Family, block: nn.Module, inputs: Inputs) -> Results:
    """Of the original in the mode that it is in; gradients that it lacks in evaluation are those
    that it has in training."""
    if block.training or family.differentiable_in_eval:
        return run(block, inputs)
    out = run(block, inputs, gradients=False)
    block.train()
    found = run(block, inputs)
    block.eval()
    return found | out


def exact_results(family: Family, block: nn.Module, inputs: Inputs) -> Results:
    """Of the original in fp64."""
    return original_results(family, exact_copy(block), cast(inputs, torch.float64))


def stacked(found: list[Results]) -> Results:
    """Results for several arguments together: of a few numbers, rounded to 16 bits, the largest
    error is a matter of luck."""
    return {name: torch.stack([results[name] for results in found]) for name in found[0]}


class Copies(TorchDispatchMode):
    """Sizes of the tensors that are copied outside of the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copying = ("aten.clone", "aten.copy", "aten._to_copy", "aten.cat", "aten.stack")
        if str(func).startswith(copying):
            self.sizes.add(out.numel())
        return out


def assert_stacked_weights_are_not_copied(block: nn.Module, inputs: Inputs) -> None:
    """Neither forward nor backward, whatever their layout."""
    with Copies() as copies:
        run(block, inputs)
    stacked = {parameter.numel() for parameter in block.parameters() if parameter.dim() == 3}
    assert stacked
    assert not stacked & copies.sizes


def assert_same_bits(actual: Results, expected: Results) -> None:
    """Every result is equal to the bit, and of the same dtype."""
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        assert result.dtype == expected[name].dtype, name
        assert torch.equal(result, expected[name]), name
