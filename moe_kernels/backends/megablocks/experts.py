"""Expert MLP: the products by megablocks; gather, activation and sums are our own kernels."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels.backends import serving
from moe_kernels.backends.megablocks.products import (
    forward,
    host_sizes,
    row_gradient,
    weight_gradient,
)
from moe_kernels.ops import activation as activation_ops
from moe_kernels.ops import experts as ops
from moe_kernels.ops import parts
from moe_kernels.ops import rows as row_ops

DEVICE_TYPES = ("cuda",)


def expert_mlp_fwd(*inputs: Any) -> tuple[Tensor, Tensor]:
    """See ``moe_kernels.ops.experts.expert_mlp``."""
    x, weights, w_in, w_out, bias_in, bias_out, shared, residual, *indices, _, activation = inputs
    assert bias_in is None, "gmm adds no bias"
    assert bias_out is None, "gmm adds no bias"
    token_indices, row_indices, row_offsets, expert_offsets = indices
    ours = _Ours(x.device, activation)
    sizes = host_sizes(expert_offsets)
    h = forward(ours.gather(x, token_indices), w_in, sizes)
    y = forward(ours.activate(h), w_out, sizes)
    combine = row_ops.combine[ours.rows]
    out = combine(y, weights, shared, residual, token_indices, row_indices, row_offsets)
    return out, h


def expert_mlp_bwd(dout: Tensor, h: Tensor, wanted: list[bool], *inputs: Any) -> tuple[Tensor, ...]:
    """See ``moe_kernels.ops.experts.expert_mlp_bwd``."""
    x, weights, w_in, w_out, _, _, *indices, _, activation = inputs
    token_indices, row_indices, row_offsets, expert_offsets = indices
    weights = weights.contiguous()
    want_x, want_weights, want_w_in, want_w_out, *_ = wanted
    ours = _Ours(x.device, activation)
    sizes = host_sizes(expert_offsets)
    dx = dweights = dw_in = dw_out = None
    a = ours.activate(h) if want_weights or want_w_out else None
    if want_x or want_weights or want_w_in:
        # Before the routing weights: <da, a> is the gate gradient <dout, w_out @ a>.
        da = row_gradient(ours.gather(dout, token_indices), w_out, sizes)
        da, dweights = ours.weigh(da, weights, a if want_weights else None)
    if want_w_out:
        assert a is not None
        dw_out = weight_gradient(ours.gather(dout, token_indices, weights), a, w_out, sizes)
    del a
    if want_x or want_w_in:
        dh = ours.activation_gradient(da, h)
        if want_w_in:
            dw_in = weight_gradient(dh, ours.gather(x, token_indices), w_in, sizes)
        if want_x:
            drows = row_gradient(dh, w_in, sizes)
            dx = row_ops.sum_rows[ours.rows](drows, None, row_indices, row_offsets)
    gradients = (dx, dweights, dw_in, dw_out, None, None)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


class _Ours:
    """What megablocks leaves to us, by the backends that serve it on this device."""

    def __init__(self, device: torch.device, activation: str) -> None:
        self.rows = serving("dispatch", device, "auto")
        self._activations = serving("activation", device, "auto")
        self._activation = activation

    def gather(self, x: Tensor, token_indices: Tensor, weights: Tensor | None = None) -> Tensor:
        """The token of each row, times its routing weight where given."""
        rows: Tensor = row_ops.gather[self.rows](x.contiguous(), token_indices, weights, None)[0]
        return rows

    def weigh(self, rows: Tensor, weights: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each row times its weight, and in fp32 its product with its values where given."""
        every_row = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        weighted, products = row_ops.gather[self.rows](rows, every_row, weights, values)
        return weighted, products

    def activate(self, h: Tensor) -> Tensor:
        a: Tensor = activation_ops.activation[self._activations](h, self._activation)
        return a

    def activation_gradient(self, da: Tensor, h: Tensor) -> Tensor:
        backward = activation_ops.activation_bwd[self._activations]
        dh: Tensor = backward(da, h.contiguous(), self._activation)
        return dh


ops.expert_mlp.implement("megablocks", expert_mlp_fwd, DEVICE_TYPES)
ops.expert_mlp_bwd.implement("megablocks", expert_mlp_bwd, DEVICE_TYPES)
parts.implement("megablocks", expert_mlp_fwd, expert_mlp_bwd, DEVICE_TYPES)
