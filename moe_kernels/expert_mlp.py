"""Stage 3, experts: grouped GEMM, and the whole dispatch - MLP - combine pipeline as one call."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels.autocast import autocast_operands
from moe_kernels.backends import resolve
from moe_kernels.checks import check_choice, check_floating, check_same_device, check_shape
from moe_kernels.combine import check_terms
from moe_kernels.dispatch import check_tokens
from moe_kernels.plan import RoutingPlan

ACTIVATIONS = ("gelu_tanh", "gelu", "swiglu")


def grouped_gemm(
    rows: Tensor,
    w: Tensor,
    expert_offsets: Tensor,
    *,
    rows_per_expert: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiply each expert's rows by its matrix: ``out[r] = w[e(r)] @ rows[r]``.

    Args:
        rows: (R, I) floating point, in expert order.
        w: (E, O, I), ``nn.Linear`` orientation, same dtype as ``rows``; also as a transposed view
            of (E, I, O), read without a copy.
        expert_offsets: (E + 1,) int32 exclusive starts, from 0 to R.
        rows_per_expert: R / E when every expert has equally many rows and the caller knows it on
            the host (``plan.rows_per_expert``); the product is then one batched GEMM, which
            takes the caller's word and does not read ``expert_offsets``.
        backend: name of a backend; ``None`` lets the resolver choose.

    Returns:
        (R, O) in the dtype of ``rows``, accumulated in fp32 for 16-bit input. Under autocast both
        operands are cast to its dtype first. An expert without rows gets a zero weight gradient.

    Raises:
        ValueError: mismatched shapes, dtypes or devices; on a CPU also offsets that do not cover
            the rows, which on a GPU nobody reads: there they must be right.
    """
    check_floating("rows", rows, 2, "(num_rows, in_features)")
    check_floating("w", w, 3, "(num_experts, out_features, in_features)")
    check_same_device("w", w, "rows", rows)
    num_experts = w.shape[0]
    check_shape("expert_offsets", expert_offsets, (num_experts + 1,), "(num_experts + 1,)")
    if expert_offsets.dtype != torch.int32:
        raise ValueError(f"expert_offsets has dtype {expert_offsets.dtype}; expected torch.int32.")
    if rows.shape[1] != w.shape[2]:
        raise ValueError(
            f"rows has {rows.shape[1]} columns; w of shape {tuple(w.shape)} expects {w.shape[2]}."
        )
    if rows_per_expert is not None and rows_per_expert * num_experts != rows.shape[0]:
        raise ValueError(
            f"rows_per_expert {rows_per_expert} times {num_experts} experts is not the "
            f"{rows.shape[0]} rows given."
        )
    rows, w = autocast_operands(rows, w)
    if rows.dtype != w.dtype:
        raise ValueError(
            f"rows is {rows.dtype} and w is {w.dtype}; expected one dtype (or autocast)."
        )
    return resolve("grouped_gemm", rows.device, backend)(rows, w, expert_offsets, rows_per_expert)


def expert_mlp(
    x: Tensor,
    plan: RoutingPlan,
    w_in: Tensor | list[Tensor],
    w_out: Tensor | list[Tensor],
    *,
    activation: str = "gelu_tanh",
    bias_in: Tensor | list[Tensor] | None = None,
    bias_out: Tensor | list[Tensor] | None = None,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Run each token through its experts and sum: the whole middle of an MoE layer.

    ``out[t] = Σ_{r of t} routing_weights[r] · (w_out[e] @ act(w_in[e] @ x[t] + bias_in[e])
    + bias_out[e])`` with e the expert of row r. ``act`` is GELU (tanh or exact), or SwiGLU:
    ``silu(gate) · up`` where ``w_in`` holds the gate half first. ``shared[t]`` and ``residual[t]``
    are added in the same pass as the sum.

    Args:
        x: (T, D) floating point.
        plan: a ``RoutingPlan`` for these T tokens.
        w_in: (E, F, D); (E, 2F, D) for ``"swiglu"``, gate half first; also as a transposed view of
            (E, D, F) or (E, D, 2F), read without a copy.
            Or a list of each expert's matrices, E of (F, D), or for ``"swiglu"`` also 2E: gate, up,
            gate, up and so on. They are read in place where each lies behind the one before in
            memory, and stacked at every call where not.
        w_out: (E, D, F), also as a transposed view of (E, F, D), read without a copy; or with a
            list in ``w_in`` a list of E (D, F), the biases alike.
        activation: ``"gelu_tanh"``, ``"gelu"`` or ``"swiglu"``.
        bias_in: (E, F) or (E, 2F), or ``None``.
        bias_out: (E, D), or ``None``.
        shared: (T, D), e.g. the shared expert's output, or ``None``.
        residual: (T, D), or ``None``.
        backend: name of a backend; ``None`` lets the resolver choose.

    Returns:
        (T, D) in the dtype of ``x``; exactly 0 for tokens without rows (plus ``shared`` and
        ``residual``). Under autocast the
        products run in its dtype.

    Raises:
        ValueError: mismatched shapes, dtypes or devices, or an unknown activation.

    Source: EC-DiT (arXiv 2410.02098), eq. 3; DiT-MoE (arXiv 2407.11633), eq. 1.
    """
    check_tokens(x, plan)
    check_choice("activation", activation, ACTIVATIONS)
    if isinstance(w_in, list):
        _check_parts(x, plan, w_in, w_out, activation, bias_in, bias_out)
    else:
        _check_stacked(x, plan, w_in, w_out, activation, bias_in, bias_out)
    check_terms(x, plan, shared, residual)
    run = resolve("expert_mlp", x.device, backend)
    return run(
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


def _check_stacked(
    x: Tensor,
    plan: RoutingPlan,
    w_in: Tensor,
    w_out: Any,
    activation: str,
    bias_in: Any,
    bias_out: Any,
) -> None:
    """Check weights that hold all experts."""
    check_floating("w_in", w_in, 3, "(num_experts, intermediate_size, hidden_size)")
    check_floating("w_out", w_out, 3, "(num_experts, hidden_size, intermediate_size)")
    num_experts, hidden_size = plan.num_experts, x.shape[1]
    intermediate_size = w_out.shape[2]
    rows_in = 2 * intermediate_size if activation == "swiglu" else intermediate_size
    words = f"(num_experts, intermediate_size, hidden_size) for activation {activation!r}"
    check_shape("w_in", w_in, (num_experts, rows_in, hidden_size), words)
    check_shape(
        "w_out",
        w_out,
        (num_experts, hidden_size, intermediate_size),
        "(num_experts, hidden_size, intermediate_size)",
    )
    operands = {"w_in": w_in, "w_out": w_out}
    if bias_in is not None:
        check_shape("bias_in", bias_in, (num_experts, rows_in), "(num_experts, rows of w_in)")
        operands["bias_in"] = bias_in
    if bias_out is not None:
        check_shape("bias_out", bias_out, (num_experts, hidden_size), "(num_experts, hidden_size)")
        operands["bias_out"] = bias_out
    for name, operand in operands.items():
        _check_operand(name, operand, x)


def _check_parts(
    x: Tensor,
    plan: RoutingPlan,
    w_in: list[Tensor],
    w_out: Any,
    activation: str,
    bias_in: Any,
    bias_out: Any,
) -> None:
    """Check weights that are lists of each expert's."""
    num_experts, hidden_size = plan.num_experts, x.shape[1]
    lists = {"w_in": w_in, "w_out": w_out, "bias_in": bias_in, "bias_out": bias_out}
    for name, parts in lists.items():
        if parts is None and name.startswith("bias"):
            continue
        if not isinstance(parts, list):
            raise ValueError(f"w_in is a list and {name} is not; expected lists of all weights.")
        many = (num_experts, 2 * num_experts) if name.endswith("in") else (num_experts,)
        if len(parts) not in many or (len(parts) != num_experts and activation != "swiglu"):
            raise ValueError(
                f"{name} is a list of {len(parts)} tensors; expected {num_experts}, one an expert"
                + (" (or gate and up of each)." if activation == "swiglu" else ".")
            )
    per_expert = len(w_in) // num_experts
    check_floating("w_out[0]", w_out[0], 2, "(hidden_size, intermediate_size)")
    intermediate_size = w_out[0].shape[1]
    rows_in = (2 if activation == "swiglu" else 1) * intermediate_size // per_expert
    shapes = {
        "w_in": (rows_in, hidden_size),
        "w_out": (hidden_size, intermediate_size),
        "bias_in": (rows_in,),
        "bias_out": (hidden_size,),
    }
    if bias_in is not None and len(bias_in) != len(w_in):
        raise ValueError(
            f"bias_in has {len(bias_in)} tensors and w_in {len(w_in)}; expected as many."
        )
    for name, parts in lists.items():
        dtype = None if parts is None else parts[0].dtype
        for i, part in enumerate(parts or ()):
            if part.shape != shapes[name] or part.dtype != dtype:
                check_shape(f"{name}[{i}]", part, shapes[name], "as w_out[0] and x say")
                raise ValueError(
                    f"{name}[{i}] is {part.dtype} and {name}[0] is {dtype}; expected one dtype."
                )
        if parts is not None:
            _check_operand(name, parts[0], x)


def _check_operand(name: str, operand: Tensor, x: Tensor) -> None:
    check_same_device(name, operand, "x", x)
    if operand.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"{name} is {operand.dtype} and x is {x.dtype}; expected one dtype (or autocast)."
        )
