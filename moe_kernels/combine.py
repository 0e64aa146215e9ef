"""Stage 4, combine: sum the weighted expert rows of each token."""

from torch import Tensor

from moe_kernels.backends import resolve
from moe_kernels.checks import check_floating, check_same_device, check_shape
from moe_kernels.plan import RoutingPlan


def combine(
    rows: Tensor,
    plan: RoutingPlan,
    *,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sum the rows of each token: ``out[t] = Σ_{r of t} routing_weights[r] · rows[r]``.

    Products and sums are taken in fp32 and cast once; rows of a token are added in ascending
    order, then ``shared[t]`` and ``residual[t]``, so equal inputs give equal bits. A token without
    rows gets exactly 0 plus these.

    Args:
        rows: (R, D) floating point, in the plan's expert order.
        plan: the ``RoutingPlan`` that the rows were dispatched with.
        shared: (T, D) added in the same pass, e.g. the shared expert's output, or ``None``.
        residual: (T, D) added in the same pass, or ``None``.
        backend: name of a backend; ``None`` lets the resolver choose.

    Returns:
        (T, D) in the dtype of ``rows``.

    Raises:
        ValueError: when rows, shared or residual do not fit the plan.
    """
    check_floating("rows", rows, 2, "(num_rows, hidden_size)")
    check_same_device("rows", rows, "the plan", plan.token_indices)
    if rows.shape[0] != plan.num_rows:
        raise ValueError(
            f"rows has shape {tuple(rows.shape)}; expected the plan's {plan.num_rows} rows first."
        )
    check_terms(rows, plan, shared, residual)
    return resolve("combine", rows.device, backend)(rows, plan, shared, residual)


def check_terms(
    like: Tensor, plan: RoutingPlan, shared: Tensor | None, residual: Tensor | None
) -> None:
    """Check what is added to the combined rows."""
    for name, term in (("shared", shared), ("residual", residual)):
        if term is not None:
            check_floating(name, term, 2, "(num_tokens, hidden_size)")
            expected = (plan.num_tokens, like.shape[1])
            check_shape(name, term, expected, "(num_tokens, hidden_size)")
            check_same_device(name, term, "rows", like)
