"""Stage 2, dispatch: copy each token to the rows of the experts that process it."""

from torch import Tensor

from moe_kernels.backends import resolve
from moe_kernels.checks import check_floating, check_same_device
from moe_kernels.plan import RoutingPlan


def check_tokens(x: Tensor, plan: RoutingPlan) -> None:
    """Raise ``ValueError`` unless ``x`` holds the tokens that ``plan`` was made for."""
    check_floating("x", x, 2, "(num_tokens, hidden_size)")
    check_same_device("x", x, "the plan", plan.token_indices)
    if x.shape[0] != plan.num_tokens:
        raise ValueError(
            f"x has {x.shape[0]} tokens (shape {tuple(x.shape)}); the plan was made for "
            f"{plan.num_tokens}. Route the same tokens, flattened to (num_tokens, hidden_size)."
        )


def dispatch(x: Tensor, plan: RoutingPlan, *, backend: str | None = None) -> Tensor:
    """Gather tokens into expert order: ``rows[r] = x[token_indices[r]]``.

    Args:
        x: (T, D) floating point.
        plan: a ``RoutingPlan`` for these T tokens.
        backend: name of a backend; ``None`` lets the resolver choose.

    Returns:
        (R, D) in the dtype of ``x``; bit-for-bit copies.

    Raises:
        ValueError: when x does not hold the plan's tokens.
    """
    check_tokens(x, plan)
    return resolve("dispatch", x.device, backend)(x, plan)
