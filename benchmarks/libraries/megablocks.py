"""megablocks: dropless experts as grouped or block-sparse products, in bfloat16.

Read from megablocks 0.10.0, ``layers/dmoe.py``, ``layers/glu.py`` and ``layers/arguments.py``. Its
matrices are w1 (gate), v1 and w2, each (E·F, D). docs/megablocks.md says more about installing it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

INSTALL: tuple[str, ...] = (
    "pip install setuptools wheel ninja numpy",
    "pip install --no-deps stanford-stk==0.7.1",
    "pip install --no-deps --no-build-isolation grouped_gemm==0.3.0",
    "pip install --no-deps --no-build-isolation megablocks==0.10.0  # CUDA 13: docs/megablocks.md",
)


class OwnLayout:
    """An ``ExpertMLP`` that can also be given the matrices as megablocks keeps them.

    Called with this project's matrices it converts them at every call, which takes time that its
    users do not spend: what is timed calls ``run`` with leaves of ``convert``.

    Args:
        implementation: ``"grouped"`` or ``"sparse"``, megablocks' ``mlp_impl``.

    Raises:
        ImportError: megablocks is not here, or refuses this implementation.
    """

    # Of what ``convert`` returns.
    names = ("w1", "v1", "w2")

    def __init__(self, implementation: str) -> None:
        self._implementation = implementation
        self._layers: dict[tuple[int, ...], Any] = {}
        try:
            self._layer(1, 1, 128, 128)
        except (AssertionError, ValueError) as error:
            raise ImportError(f"megablocks refuses {implementation!r}: {error}") from error

    def __call__(
        self, x: Tensor, weights: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor
    ) -> Tensor:
        return self.run(x, weights, chosen, w_out.shape[0], self.convert(w_in, w_out))

    def convert(self, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, ...]:
        """w1, v1 and w2 from (E, 2F, D) and (E, D, F)."""
        matrices = (*w_in.chunk(2, dim=1), w_out.transpose(1, 2))
        return tuple(matrix.flatten(0, 1).contiguous() for matrix in matrices)

    def restore(self, gradients: tuple[Tensor, ...], num_experts: int) -> tuple[Tensor, Tensor]:
        """Gradients of w_in and w_out from those of w1, v1 and w2."""
        gate, up, down = (gradient.unflatten(0, (num_experts, -1)) for gradient in gradients)
        return torch.cat([gate, up], dim=1), down.transpose(1, 2)

    def run(
        self,
        x: Tensor,
        weights: Tensor,
        chosen: Tensor,
        num_experts: int,
        matrices: tuple[Tensor, ...],
    ) -> Tensor:
        """Sort, gather, products, weighted scatter: what a dMoE does after its router."""
        if x.dtype != torch.bfloat16:
            raise ValueError(f"megablocks multiplies bfloat16 here, the tokens are {x.dtype}")
        hidden_size, rows = x.shape[1], matrices[0].shape[0]
        layer = self._layer(num_experts, chosen.shape[1], hidden_size, rows // num_experts)
        for name, matrix in zip(self.names, matrices, strict=True):
            setattr(layer.mlp, name, matrix)
        out: Tensor = layer.forward_once(x, weights, chosen)[0]
        return out

    def _layer(self, num_experts: int, top_k: int, hidden_size: int, width: int) -> Any:
        """A ``ParallelDroplessMLP`` without matrices, made once for each shape."""
        from megablocks import Arguments, ParallelDroplessMLP

        shape = (num_experts, top_k, hidden_size, width)
        if shape not in self._layers:
            arguments = Arguments(
                hidden_size=hidden_size,
                ffn_hidden_size=width,
                bias=False,
                activation_fn=F.silu,
                moe_num_experts=num_experts,
                moe_top_k=top_k,
                mlp_type="glu",
                mlp_impl=self._implementation,
                fp16=False,
                bf16=True,
                device=torch.device("meta"),
            )
            layer = ParallelDroplessMLP(arguments)
            # Plain attributes from here on, which take the benchmark's own tensors.
            for name in self.names:
                delattr(layer.mlp, name)
            self._layers[shape] = layer
        return self._layers[shape]


def grouped() -> OwnLayout:
    """Grouped products, by grouped_gemm: ``mlp_impl="grouped"``."""
    return OwnLayout("grouped")


def sparse() -> OwnLayout:
    """Block-sparse products, by stk: ``mlp_impl="sparse"``, which refuses Triton 3.2 and newer."""
    return OwnLayout("sparse")
