"""Token choice with the grouped products of megablocks; see docs/megablocks.md.

Importing this raises ``ImportError`` with the reason where they cannot be used.
"""

from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from moe_kernels.autocast import autocast_operands
from moe_kernels.backends import BackendUnavailable, serving
from moe_kernels.backends.megablocks import experts
from moe_kernels.backends.megablocks.library import DOCS, find_gmm
from moe_kernels.backends.stages import Stages
from moe_kernels.plan import RoutingPlan

# Importing this has given the ops their kernels.
KERNELS = (experts,)

find_gmm()  # or the reason why there is no such backend here

_STAGES = Stages("megablocks", has_fp64=False)


def expert_mlp(
    x: Tensor,
    plan: RoutingPlan,
    w_in: Tensor | list[Tensor],
    w_out: Tensor | list[Tensor],
    *,
    activation: str,
    bias_in: Tensor | list[Tensor] | None,
    bias_out: Tensor | list[Tensor] | None,
    shared: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """See ``moe_kernels.expert_mlp``.

    Raises:
        BackendUnavailable: for what these products cannot compute, with the reason.
    """
    reason = why_not(x, plan, bias_in is not None or bias_out is not None)
    if reason is not None:
        raise BackendUnavailable(
            f"backend 'megablocks' was requested for expert_mlp but {reason}. Use another backend "
            f"for this call, or 'auto'; see {DOCS}."
        )
    return _STAGES.expert_mlp(
        x,
        plan,
        w_in,
        w_out,
        activation=activation,
        bias_in=bias_in,
        bias_out=bias_out,
        shared=shared,
        residual=residual,
    )


def why_not(x: Tensor, plan: RoutingPlan, has_bias: bool) -> str | None:
    """Say why this call cannot be computed so; ``None`` when it can."""
    (tokens,) = autocast_operands(x)
    if tokens.dtype != torch.bfloat16:
        how = "cast tokens and weights to torch.bfloat16, or use autocast with it"
        return f"multiplies torch.bfloat16 only and the tokens are {tokens.dtype}: {how}"
    if plan.router != "token_choice":
        return f"serves plans of token choice only, not of router {plan.router!r}"
    if has_bias:
        return "adds no biases: build the layer with bias=False"
    if "reference" in (serving(op, x.device, "auto") for op in ("dispatch", "activation")):
        return "needs Triton for gather, activation and sum: install triton"
    return None


def describe() -> str:
    """Versions, for the backends table."""
    found = []
    for package in ("grouped_gemm", "megablocks"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


IMPLEMENTATIONS: dict[str, Any] = {"expert_mlp": expert_mlp}
