"""How an op is called for a case: meta tensors, as the public stages pass them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.triton_check.cases import SIZES, Case, Sizes
from moe_kernels.ops import activation as activation_ops
from moe_kernels.ops import experts as expert_ops
from moe_kernels.ops import route as route_ops
from moe_kernels.ops import rows as row_ops
from moe_kernels.ops.pack import packed_sizes, unpack

Arguments = tuple[Any, ...]


def call(case: Case) -> None:
    """Run the Triton kernel of the case's op; its launches are recorded, not started.

    The kernel itself is called, not the op: autocast does not know the meta device.
    """
    operator, arguments = CALLS[case.op]
    operator["triton"].kernel(*arguments(case, SIZES[case.sizes]))


def _empty(case: Case, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, case.dtype), device="meta")


def _weight(case: Case, *shape: int) -> Tensor:
    """An expert weight (E, rows, columns), with ``transposed`` as a view of (E, columns, rows)."""
    if not case.options.get("transposed"):
        return _empty(case, *shape)
    experts, rows, columns = shape
    return _empty(case, experts, columns, rows).transpose(1, 2)


def _fp32(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


def _packed(s: Sizes) -> tuple[Tensor, list[int]]:
    sizes = packed_sizes(s.T, s.E, s.G, s.R, s.K)
    return torch.empty(sum(sizes), dtype=torch.int32, device="meta"), sizes


def _plan(s: Sizes) -> Any:
    """Index tensors of a plan: views of one buffer, so most are not aligned to 16 bytes."""
    return unpack(*_packed(s))


def _affinity(case: Case) -> str:
    return str(case.options.get("affinity", "softmax"))


def _token_choice(case: Case, s: Sizes) -> Arguments:
    bias = _fp32(s.E) if case.options.get("bias") else None
    groups = case.options.get("expert_groups", 1)
    taken = max(1, groups // 2)
    per_token = bool(case.options.get("per_token"))
    logits = _fp32(s.T, s.E)
    return (logits, bias, s.K, _affinity(case), per_token, 1.0, groups, taken, s.G, False)


def _expert_choice(case: Case, s: Sizes) -> Arguments:
    capacity = s.R // (s.G * s.E)
    per_token = bool(case.options.get("per_token"))
    return _fp32(s.T, s.E), capacity, _affinity(case), per_token, 1.0, s.G, False


def _route_bwd(case: Case, s: Sizes) -> Arguments:
    losses = case.options.get("losses", True)
    gradients = (_fp32(), _fp32(), _fp32(2 + s.E)) if losses else (None, None, None)
    per_token = bool(case.options.get("per_token"))
    settings = (s.R, s.G, _affinity(case), per_token, 1.0)
    return _fp32(s.T, s.E), _packed(s)[0], _fp32(s.R), *gradients, *settings


def _similarity(case: Case, s: Sizes) -> Arguments:
    plan = _plan(s)
    return _fp32(s.T, s.E), plan.row_experts, plan.row_offsets


def _similarity_bwd(case: Case, s: Sizes) -> Arguments:
    return _fp32(s.T, s.E), _fp32(s.E, s.E), _fp32()


def _gather(case: Case, s: Sizes) -> Arguments:
    weights = _fp32(s.R) if case.options.get("weights") else None
    values = _empty(case, s.R, s.D) if case.options.get("values") else None
    return _empty(case, s.T, s.D), _plan(s).token_indices, weights, values


def _sum_rows(case: Case, s: Sizes) -> Arguments:
    plan = _plan(s)
    return _empty(case, s.R, s.D), None, plan.row_indices, plan.row_offsets


def _dispatch(case: Case, s: Sizes) -> Arguments:
    plan = _plan(s)
    return _empty(case, s.T, s.D), plan.token_indices, plan.row_indices, plan.row_offsets


def _terms(case: Case, s: Sizes) -> tuple[Tensor | None, Tensor | None]:
    shared = _empty(case, s.T, s.D) if case.options.get("shared") else None
    return shared, _empty(case, s.T, s.D) if case.options.get("residual") else None


def _combine(case: Case, s: Sizes) -> Arguments:
    plan = _plan(s)
    indices = (plan.token_indices, plan.row_indices, plan.row_offsets)
    return _empty(case, s.R, s.D), _fp32(s.R), *_terms(case, s), *indices


def _width(case: Case, s: Sizes) -> int:
    """Rows of an expert's first matrix; SwiGLU has two of them above each other."""
    return 2 * s.F if case.options["activation"] == "swiglu" else s.F


def _activation(case: Case, s: Sizes) -> Arguments:
    return _empty(case, s.R, _width(case, s)), case.options["activation"]


def _activation_bwd(case: Case, s: Sizes) -> Arguments:
    return _empty(case, s.R, s.F), *_activation(case, s)


def _mlp_inputs(case: Case, s: Sizes) -> Arguments:
    has_bias = case.options.get("bias")
    width = _width(case, s)
    return (
        _empty(case, s.T, s.D),
        _fp32(s.R),
        _weight(case, s.E, width, s.D),
        _weight(case, s.E, s.D, s.F),
        _empty(case, s.E, width) if has_bias else None,
        _empty(case, s.E, s.D) if has_bias else None,
    )


def _rows_per_expert(s: Sizes) -> int:
    """Of equal groups; 0 where tokens choose."""
    return 0 if s.K else s.R // s.E


def _mlp_indices(case: Case, s: Sizes) -> Arguments:
    plan = _plan(s)
    indices = (plan.token_indices, plan.row_indices, plan.row_offsets, plan.expert_offsets)
    return *indices, _rows_per_expert(s), case.options["activation"]


def _expert_mlp(case: Case, s: Sizes) -> Arguments:
    return *_mlp_inputs(case, s), *_terms(case, s), *_mlp_indices(case, s)


def _expert_mlp_bwd(case: Case, s: Sizes) -> Arguments:
    inputs = _mlp_inputs(case, s)
    wanted = [tensor is not None for tensor in inputs]
    saved = (_empty(case, s.T, s.D), _empty(case, s.R, _width(case, s)))
    return *saved, wanted, *inputs, *_mlp_indices(case, s)


def _grouped_gemm(case: Case, s: Sizes) -> Arguments:
    groups = (_plan(s).expert_offsets, _rows_per_expert(s))
    return _empty(case, s.R, s.D), _weight(case, s.E, s.F, s.D), *groups


def _grouped_gemm_bwd(case: Case, s: Sizes) -> Arguments:
    return _empty(case, s.R, s.F), [True, True], *_grouped_gemm(case, s)


CALLS: dict[str, tuple[Any, Callable[[Case, Sizes], Arguments]]] = {
    "token_choice": (route_ops.token_choice, _token_choice),
    "expert_choice": (route_ops.expert_choice, _expert_choice),
    "route_bwd": (route_ops.route_bwd, _route_bwd),
    "affinity": (route_ops.affinity, lambda case, s: (_fp32(s.T, s.E), _affinity(case))),
    "similarity": (route_ops.similarity, _similarity),
    "similarity_bwd": (route_ops.similarity_bwd, _similarity_bwd),
    "gather": (row_ops.gather, _gather),
    "sum_rows": (row_ops.sum_rows, _sum_rows),
    "dispatch": (row_ops.dispatch, _dispatch),
    "combine": (row_ops.combine, _combine),
    "activation": (activation_ops.activation, _activation),
    "activation_bwd": (activation_ops.activation_bwd, _activation_bwd),
    "expert_mlp": (expert_ops.expert_mlp, _expert_mlp),
    "expert_mlp_bwd": (expert_ops.expert_mlp_bwd, _expert_mlp_bwd),
    "grouped_gemm": (expert_ops.grouped_gemm, _grouped_gemm),
    "grouped_gemm_bwd": (expert_ops.grouped_gemm_bwd, _grouped_gemm_bwd),
}
