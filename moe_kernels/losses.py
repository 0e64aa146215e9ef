"""Stage 5, losses: each returned unweighted, so that the caller's coefficient is in plain sight."""

from torch import Tensor

from moe_kernels.backends import resolve
from moe_kernels.checks import check_shape
from moe_kernels.plan import RoutingPlan


def load_balance_loss(
    plan: RoutingPlan,
    *,
    per_sequence: bool = False,
    tokens_per_expert: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Penalise experts that are both probable and busy: ``Σ_e f_e · P_e``.

    ``f_e = E/R · (rows of expert e)`` and ``P_e = 1/T · Σ_t p[t, e]``, with R = K·T for token
    choice. Uniform routing gives exactly 1; all tokens on one expert gives E for K = 1. p is the
    softmax affinity; sigmoid affinities are divided by their sum over experts; for identity
    affinity it is the softmax of the logits. Only P carries a gradient.

    Args:
        plan: the routing of one layer.
        per_sequence: compute f and P inside each of the plan's ``num_groups`` sequences and
            average, instead of pooling the micro-batch.
        tokens_per_expert: (E,) counts to take f from, when the pool is larger than this plan (all
            micro-batches of a step, or all ranks); the mean of such losses over equal plans is the
            loss of the large batch, gradient included. Not together with ``per_sequence``.
        backend: name of a backend; ``None`` lets the resolver choose.

    Returns:
        A scalar tensor in the precision of the logits (not multiplied by any coefficient).

    Raises:
        ValueError: ``tokens_per_expert`` of another length, or given with ``per_sequence``; a plan
            without logits (``plan_from_choices``).

    Source: DiT-MoE (arXiv 2407.11633), balance loss, without its factor alpha.
    """
    check_logits(plan)
    if tokens_per_expert is not None:
        expected = (plan.num_experts,)
        check_shape("tokens_per_expert", tokens_per_expert, expected, "(num_experts,)")
        if per_sequence:
            raise ValueError(
                "tokens_per_expert is given with per_sequence=True; counts of a larger pool say "
                "nothing about single sequences. Give only one."
            )
    run = resolve("load_balance_loss", plan.router_logits.device, backend)
    return run(plan, per_sequence, tokens_per_expert)


def router_z_loss(plan: RoutingPlan, *, backend: str | None = None) -> Tensor:
    """Keep router logits small: ``1/T · Σ_t logsumexp_e(router_logits[t])²``.

    Args:
        plan: the routing of one layer.
        backend: name of a backend; ``None`` lets the resolver choose.

    Returns:
        A scalar tensor in the precision of the logits (not multiplied by any coefficient).

    Source: ST-MoE (arXiv 2202.08906), eq. 5.
    """
    check_logits(plan)
    return resolve("router_z_loss", plan.router_logits.device, backend)(plan)


def router_similarity_loss(plan: RoutingPlan, *, backend: str | None = None) -> Tensor:
    """Push experts that are chosen together apart: ``1/T · Σ_ij W_ij (PᵀP)_ij``.

    P = softmax(router_logits) (T, E). With the 0/1 selection M (T, E) and ``Q = MᵀM``,
    ``W_ii = E · Q_ii / Σ_k Q_kk`` and ``W_ij = (E² - E) · Q_ij / Σ_{k≠l} Q_kl`` off the diagonal,
    so that each part of W averages 1 (the off-diagonal part is 0 when no token has two experts).
    Only P carries a gradient.

    Args:
        plan: the routing of one layer.
        backend: name of a backend; ``None`` lets the resolver choose.

    Returns:
        A scalar tensor in the precision of the logits (not multiplied by any coefficient).

    Source: Expert Race (arXiv 2503.16057), section 5.
    """
    check_logits(plan)
    return resolve("router_similarity_loss", plan.router_logits.device, backend)(plan)


def check_logits(plan: RoutingPlan) -> None:
    """Raise ``ValueError`` when a plan has no logits."""
    if plan.affinity == "given":
        raise ValueError(
            "the plan was made from choices and has no router logits, of which losses and "
            "statistics are made; compute them with the router that chose."
        )
