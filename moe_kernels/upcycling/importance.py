"""Measured importance of the channels of dense MLPs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.upcycling.activations import activate
from moe_kernels.upcycling.blocks import DenseMLP
from moe_kernels.upcycling.find import find_blocks


def measure_importance(
    model: nn.Module,
    run: Callable[[], object],
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Measure how much each channel of the dense MLPs adds to the output on your data.

    ``importance[f] = mean_t |act(w_in x[t])[f]| · |w_out[:, f]|``, the mean over all tokens that
    ``run()`` sends through the block. Give the result to ``upcycle(..., mode="split",
    importance=...)``.

    Args:
        model: the dense model.
        run: calls the model on your data, as often as you like.
        include, exclude: as for ``upcycle``.

    Returns:
        (F,) fp32 for each block that was run, by module path.

    Raises:
        ValueError: ``run()`` sent no token through a dense MLP of this model.
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    handles = []

    def watch(path: str, dense: DenseMLP) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            with torch.no_grad():
                h = F.linear(x.to(dense.w_in.dtype).flatten(0, -2), dense.w_in, dense.bias_in)
                size = activate(h, dense.elementwise, dense.gated).float().abs().sum(dim=0)
            sums[path] = sums.get(path, 0) + size
            tokens[path] = tokens.get(path, 0) + h.shape[0]

        return hook

    found = [block for block in find_blocks(model, include, exclude) if block.dense is not None]
    try:
        for block in found:
            assert block.dense is not None
            hook = watch(block.path, block.dense)
            handles.append(block.module.register_forward_pre_hook(hook, with_kwargs=True))
        run()
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise ValueError(
            f"run() sent nothing through the {len(found)} dense MLPs of {type(model).__name__}; "
            "expected it to call this model, not a copy or a compiled version of it."
        )
    norms = {
        block.path: block.dense.w_out.float().norm(dim=0)
        for block in found
        if block.dense is not None
    }
    return {path: total / tokens[path] * norms[path] for path, total in sums.items()}
