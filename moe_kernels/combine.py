"""Stage 4, combine: sum the weighted expert rows of each token."""

from torch import Tensor

from moe_kernels.backends import resolve
from moe_kernels.checks import check_floating, check_same_device
from moe_kernels.plan import RoutingPlan


def combine(rows: Tensor, plan: RoutingPlan, *, backend: str | None = None) -> Tensor:
    """Sum the rows of each token: ``out[t] = Σ_{r of t} routing_weights[r] · rows[r]``.

    Products and sums are taken in fp32 and cast once; rows of a token are added in ascending
    order, so equal inputs give equal bits. A token without rows gets exactly 0.

    Args:
        rows: (R, D) floating point, in the plan's expert order.
        plan: the ``RoutingPlan`` that the rows were dispatched with.
        backend: name of a backend; ``None`` lets the resolver choose.

    Returns:
        (T, D) in the dtype of ``rows``.

    Raises:
        ValueError: when rows are not those of the plan.
    """
    check_floating("rows", rows, 2, "(num_rows, hidden_size)")
    check_same_device("rows", rows, "the plan", plan.token_indices)
    if rows.shape[0] != plan.num_rows:
        raise ValueError(
            f"rows has shape {tuple(rows.shape)}; expected the plan's {plan.num_rows} rows first."
        )
    return resolve("combine", rows.device, backend)(rows, plan)
