"""Which outputs of a run are differentiated, and with which random upstream gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.entry import Inputs, Run


def differentiable(run: Run, inputs: Inputs) -> int:
    """How many outputs, from the first, have an upstream gradient."""
    return sum(name in inputs.upstream for name in run.outputs)


def upstream_of(run: Run, inputs: Inputs, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Their upstream gradients, in the dtypes of these outputs."""
    names = zip(run.outputs, outputs, strict=False)
    return [inputs.upstream[name].to(out.dtype) for name, out in names]


def step(run: Run, inputs: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One forward and backward: all outputs, and the gradients of the leaves in their order."""
    outputs = run.call()
    differentiated = outputs[: differentiable(run, inputs)]
    upstream = upstream_of(run, inputs, differentiated)
    return outputs, torch.autograd.grad(differentiated, run.flat_leaves, upstream)
