"""Compares a swapped block with its original on random input."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels.integrations.report import SwapRow, VerificationFailed
from moe_kernels.integrations.swapped import Swapped
from moe_kernels.testing import ERROR_FLOOR, relative_error


def verify_block(block: nn.Module, row: SwapRow, seed: int = 0) -> SwapRow:
    """Run both versions of a swapped block, forward and backward, and compare.

    The rule is that of the test suite: against the original in fp64, the swapped block may err at
    most twice as much as the original does in the block's dtype (or a floor for the dtype). An
    original that cannot compute in fp64 is run in fp32; for one that cannot compute in the block's
    dtype, four times the floor is allowed.

    Returns:
        The row with both errors in units of what is allowed. Where the original has no gradients,
        or wrong ones (some in eval mode), only outputs are compared.

    Raises:
        VerificationFailed: when an error is larger than allowed.
    """
    assert isinstance(block, Swapped)
    adapter, original_class = block.adapter, block.original_class
    generator = torch.Generator().manual_seed(seed)
    inputs = adapter.example(block, generator)
    unreadable = _why_unreadable(block)
    if unreadable is not None:
        return replace(row, detail=f"{row.detail}; not verified: weights are {unreadable}")
    plain: Any = copy.deepcopy(block)
    plain.__class__ = original_class
    upstream = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64)
    actual = _run(block, inputs, upstream)
    plainly = _run_if_possible(plain, inputs, upstream)
    expected = _run_if_possible(adapter.exact(plain), _cast(inputs, torch.float64), upstream)
    if expected is None:
        expected = _run(plain.float(), _cast(inputs, torch.float32), upstream)
    first = slice(0, 1)
    output_error = _largest_error(actual, plainly, expected, first)
    gradient_error = None
    if adapter.differentiable(block) and len(expected) > 1:
        gradient_error = _largest_error(actual, plainly, expected, slice(1, None))
    row = replace(row, output_error=output_error, gradient_error=gradient_error)
    # Written so that an error that is not a number fails, too.
    if not (output_error <= 1.0 and (gradient_error is None or gradient_error <= 1.0)):
        raise VerificationFailed(
            f"{row.path} ({row.class_name}): the error of the output is {output_error:.3g} and of "
            f"the gradients {gradient_error} times what is allowed; nothing stays swapped. Please "
            "report this, with the versions that `python -m moe_kernels.doctor` prints."
        )
    return row


def _why_unreadable(block: nn.Module) -> str | None:
    """Where the weights are, when this process cannot compute with them now."""
    for parameter in block.parameters():
        if parameter.is_meta:
            return "on the meta device"
        if type(parameter).__name__ == "DTensor":
            return "sharded; verify before fully_shard"
    return None


def _cast(inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs]


def _run_if_possible(
    block: nn.Module, inputs: Sequence[Tensor], upstream: Tensor
) -> list[Tensor] | None:
    try:
        return _run(block, inputs, upstream)
    except RuntimeError:  # some originals mix dtypes as soon as theirs is not fp32
        return None


def _run(block: nn.Module, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Output, then gradients of the inputs and of the parameters; output only where it has none."""
    inputs = [
        tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in inputs
    ]
    with torch.enable_grad():
        output: Any = block(*inputs)
        if isinstance(output, tuple):
            output = output[0]
        if not output.requires_grad:
            return [output]
        leaves = [leaf for leaf in (*inputs, *block.parameters()) if leaf.requires_grad]
        gradients = torch.autograd.grad(
            output, leaves, upstream.to(output.device, output.dtype), allow_unused=True
        )
    zeros = (torch.zeros_like(leaf) for leaf in leaves)
    return [output, *(z if g is None else g for g, z in zip(gradients, zeros, strict=True))]


def _largest_error(
    actual: list[Tensor], plain: list[Tensor] | None, exact: list[Tensor], part: slice
) -> float:
    """The largest error over what is allowed."""
    worst = 0.0
    for number, ours in list(enumerate(actual))[part]:
        floor, right = ERROR_FLOOR[ours.dtype], exact[number]
        if plain is None or len(plain) != len(actual):
            allowed = 4 * floor
        else:
            allowed = max(2 * relative_error(plain[number], right), floor)
        error = relative_error(ours, right) / allowed
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst
