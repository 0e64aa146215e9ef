"""How the stages call the ops: the same for every backend whose kernels are ops of ``ops/``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_kernels.autocast import autocast_operands
from moe_kernels.backends import reference
from moe_kernels.ops import activation as activation_ops
from moe_kernels.ops import experts as expert_ops
from moe_kernels.ops import parts as part_ops
from moe_kernels.ops import route as route_ops
from moe_kernels.ops import rows as row_ops
from moe_kernels.plan import FusedRouting, RoutingPlan


@dataclass(frozen=True)
class Stages:
    """The stage functions of one backend; signatures are the reference's.

    Attributes:
        backend: whose variants of the ops are called.
        has_fp64: whether its kernels take fp64; if not, the reference serves fp64 tensors.
        largest_experts: the largest E of its routing kernels; the reference routes over more.
            ``None`` is no limit.
    """

    backend: str
    has_fp64: bool
    largest_experts: int | None = None

    def implementations(self) -> dict[str, Callable[..., Any]]:
        """Stage functions by the names of ``backends.OPS``."""
        return {
            "expert_choice": self.expert_choice,
            "token_choice": self.token_choice,
            "router_probs": self.router_probs,
            "dispatch": self.dispatch,
            "grouped_gemm": self.grouped_gemm,
            "expert_mlp": self.expert_mlp,
            "activation": self.activation,
            "combine": self.combine,
            "load_balance_loss": self.load_balance_loss,
            "router_z_loss": self.router_z_loss,
            "router_similarity_loss": self.router_similarity_loss,
        }

    def _serves(self, dtype: torch.dtype) -> bool:
        return self.has_fp64 or dtype != torch.float64

    def _routes(self, router_logits: Tensor) -> bool:
        few = self.largest_experts is None or router_logits.shape[1] <= self.largest_experts
        return few and self._serves(router_logits.dtype)

    def router_probs(self, router_logits: Tensor, affinity: str) -> Tensor:
        """(T, E) affinities, to the bit those that the routing kernels select by."""
        if not self._routes(router_logits):
            return reference.compute_affinity(router_logits, affinity)
        return route_ops.affinity[self.backend](router_logits, affinity)

    def token_choice(
        self,
        router_logits: Tensor,
        *,
        top_k: int,
        affinity: str,
        normalize: str,
        scale: float,
        selection_bias: Tensor | None,
        num_expert_groups: int,
        top_k_groups: int,
        num_groups: int,
        check_finite: bool,
    ) -> RoutingPlan:
        """See ``moe_kernels.token_choice``."""
        if not self._routes(router_logits):
            return reference.token_choice(
                router_logits,
                top_k=top_k,
                affinity=affinity,
                normalize=normalize,
                scale=scale,
                selection_bias=selection_bias,
                num_expert_groups=num_expert_groups,
                top_k_groups=top_k_groups,
                num_groups=num_groups,
                check_finite=check_finite,
            )
        outputs = route_ops.token_choice[self.backend](
            router_logits,
            selection_bias,
            top_k,
            affinity,
            normalize == "per_token",
            scale,
            num_expert_groups,
            top_k_groups,
            num_groups,
            check_finite,
        )
        return self._make_plan(
            router_logits, outputs, "token_choice", affinity, num_groups, top_k, None
        )

    def expert_choice(
        self,
        router_logits: Tensor,
        *,
        capacity: int,
        num_groups: int,
        affinity: str,
        normalize: str,
        scale: float,
        check_finite: bool,
    ) -> RoutingPlan:
        """See ``moe_kernels.expert_choice``."""
        if not self._routes(router_logits):
            return reference.expert_choice(
                router_logits,
                capacity=capacity,
                num_groups=num_groups,
                affinity=affinity,
                normalize=normalize,
                scale=scale,
                check_finite=check_finite,
            )
        outputs = route_ops.expert_choice[self.backend](
            router_logits,
            capacity,
            affinity,
            normalize == "per_token",
            scale,
            num_groups,
            check_finite,
        )
        return self._make_plan(
            router_logits, outputs, "expert_choice", affinity, num_groups, None, capacity
        )

    def _make_plan(
        self,
        router_logits: Tensor,
        outputs: route_ops.RouteOutputs,
        router: str,
        affinity: str,
        num_groups: int,
        top_k: int | None,
        capacity: int | None,
    ) -> RoutingPlan:
        weights, load_balance, z_loss, terms, packed = outputs
        tokens, experts = router_logits.shape
        return RoutingPlan.from_kernel(
            FusedRouting(load_balance, z_loss, terms, packed),
            router=router,
            affinity=affinity,
            num_tokens=tokens,
            num_experts=experts,
            num_groups=num_groups,
            top_k=top_k,
            capacity=capacity,
            router_logits=router_logits,
            routing_weights=weights,
            backend=self.backend,
        )

    def dispatch(self, x: Tensor, plan: RoutingPlan) -> Tensor:
        """See ``moe_kernels.dispatch``."""
        if not self._serves(x.dtype):
            return reference.dispatch(x, plan)
        return row_ops.dispatch[self.backend](
            x, plan.token_indices, plan.row_indices, plan.row_offsets
        )

    def grouped_gemm(
        self, rows: Tensor, w: Tensor, expert_offsets: Tensor, rows_per_expert: int | None
    ) -> Tensor:
        """See ``moe_kernels.grouped_gemm``."""
        if not self._serves(rows.dtype):
            return reference.grouped_gemm(rows, w, expert_offsets, rows_per_expert)
        return expert_ops.grouped_gemm[self.backend](rows, w, expert_offsets, rows_per_expert or 0)

    def expert_mlp(
        self,
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
        """See ``moe_kernels.expert_mlp``."""
        (tokens,) = autocast_operands(x)
        if not self._serves(tokens.dtype):
            return reference.expert_mlp(
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
        dtype = tokens.dtype
        # Under autocast the terms keep their precision: they are added to the result instead.
        fused = (shared, residual) if dtype == x.dtype else (None, None)
        weights: tuple[Any, ...] = (w_in, w_out, bias_in, bias_out)
        if isinstance(w_in, list):
            operator = part_ops.expert_mlp_parts
            weights = tuple([] if parts is None else parts for parts in weights)
        else:
            operator = expert_ops.expert_mlp
            weights = tuple(None if weight is None else weight.to(dtype) for weight in weights)
        out, _ = operator[self.backend](
            tokens,
            plan.routing_weights.to(wide_dtype(dtype)),
            *weights,
            *(None if term is None else term.to(dtype) for term in fused),
            plan.token_indices,
            plan.row_indices,
            plan.row_offsets,
            plan.expert_offsets,
            plan.rows_per_expert or 0,
            activation,
        )
        out = out.to(x.dtype)
        if dtype != x.dtype:
            for term in (shared, residual):
                out = out if term is None else out + term.to(x.dtype)
        return out

    def activation(self, h: Tensor, activation: str) -> Tensor:
        """GELU (tanh or exact) or SwiGLU over the last dimension."""
        if not self._serves(h.dtype):
            return reference.activate(h, activation)
        return activation_ops.activation[self.backend](h, activation)

    def combine(
        self, rows: Tensor, plan: RoutingPlan, shared: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """See ``moe_kernels.combine``."""
        if not self._serves(rows.dtype):
            return reference.combine(rows, plan, shared, residual)
        return row_ops.combine[self.backend](
            rows,
            plan.routing_weights.to(wide_dtype(rows.dtype)),
            shared,
            residual,
            plan.token_indices,
            plan.row_indices,
            plan.row_offsets,
        )

    def load_balance_loss(
        self, plan: RoutingPlan, per_sequence: bool, tokens_per_expert: Tensor | None
    ) -> Tensor:
        """See ``moe_kernels.load_balance_loss``; the routing kernels have computed it."""
        fused = plan.fused
        if fused is None:  # a plan of the reference
            return reference.load_balance_loss(plan, per_sequence, tokens_per_expert)
        if tokens_per_expert is not None:
            mean_prob = fused.terms[route_ops.MEAN_PROB :]
            rows = tokens_per_expert.to(mean_prob.dtype)
            return (rows * (plan.num_experts / rows.sum().clamp_min(1)) * mean_prob).sum()
        return fused.terms[route_ops.BALANCE_PER_GROUP] if per_sequence else fused.load_balance

    def router_z_loss(self, plan: RoutingPlan) -> Tensor:
        """See ``moe_kernels.router_z_loss``; the routing kernels have computed it."""
        return reference.router_z_loss(plan) if plan.fused is None else plan.fused.z_loss

    def router_similarity_loss(self, plan: RoutingPlan) -> Tensor:
        """See ``moe_kernels.router_similarity_loss``."""
        if plan.fused is None:
            return reference.router_similarity_loss(plan)
        row_experts = plan.packed_indices.row_experts
        return route_ops.similarity[self.backend](
            plan.router_logits, row_experts, plan.row_offsets
        )[0]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers of this dtype are added up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
