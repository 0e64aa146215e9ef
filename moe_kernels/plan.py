"""``RoutingPlan``: what a router decided, in the one form that every later stage reads."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moe_kernels.ops.pack import PlanIndices, packed_sizes, unpack

if TYPE_CHECKING:
    from moe_kernels.telemetry import RoutingStats


class FusedRouting(NamedTuple):
    """What a routing kernel computed in the same pass as the plan; losses and telemetry read it.

    Attributes:
        load_balance: scalar, the balance loss over the whole pool, differentiable.
        z_loss: scalar, differentiable.
        terms: (2 + E,) balance loss per sequence, mean entropy (no gradient), mean distribution.
        packed: int32, all indices of the plan in one buffer; see ``RoutingPlan.packed_indices``.
    """

    load_balance: Tensor
    z_loss: Tensor
    terms: Tensor
    packed: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutingPlan:
    """Which token each expert row reads, with what weight, and the way back.

    Rows are in expert order: expert ``e`` owns rows ``expert_offsets[e]`` to
    ``expert_offsets[e + 1]``. Inside an expert (expert choice: inside an expert and group) rows
    are in token order. T is the number of tokens, E of experts, R of rows (T·K for token choice,
    E·G·C for expert choice).

    Attributes:
        router: ``"expert_choice"``, ``"token_choice"``, or ``"selection"`` for any other set of
            token-expert pairs (``plan_from_selection``).
        affinity: ``"softmax"``, ``"sigmoid"`` or ``"identity"``; ``"given"`` when a model's own
            router chose (``plan_from_choices``), and the plan has no logits.
        num_tokens: T.
        num_experts: E.
        num_groups: G, the number of pools (expert choice) or sequences (token choice).
        top_k: K, experts per token; ``None`` unless all tokens have as many.
        capacity: C, tokens per expert and group; ``None`` unless all have as many.
        router_logits: (T, E) fp32 (fp64 for fp64 input), differentiable.
        routing_weights: (R,) what each row's expert output is multiplied by, differentiable.
        token_indices: (R,) int32, the token each row reads.
        expert_offsets: (E + 1,) int32, exclusive starts; ``[1:]`` are ``grouped_mm``'s ``offs``.
        tokens_per_expert: (E,) int32.
        row_indices: (R,) int32, rows of token 0, then of token 1, ...; ascending inside a token.
        row_offsets: (T + 1,) int32, where each token's rows start in ``row_indices``.
        expert_indices: (T, K) int32, experts of each token by falling weight; ``None`` for
            expert choice.
        backend: who routed; ``router_probs`` are the affinities that it selected by.
        fused: results of the same pass, when a kernel routed.
    """

    router: str
    affinity: str
    num_tokens: int
    num_experts: int
    num_groups: int
    top_k: int | None
    capacity: int | None
    router_logits: Tensor
    routing_weights: Tensor
    token_indices: Tensor
    expert_offsets: Tensor
    tokens_per_expert: Tensor
    row_indices: Tensor
    row_offsets: Tensor
    expert_indices: Tensor | None
    backend: str = "reference"
    fused: FusedRouting | None = None

    @classmethod
    def from_kernel(cls, fused: FusedRouting, **fields: Any) -> "RoutingPlan":
        """Make a plan whose indices are views of one buffer.

        In eager code the views are cut when first asked for (``__getattr__``): with them and the
        checks of a frozen dataclass, making the plan would take longer than routing 256 tokens.
        """
        if torch.compiler.is_compiling():
            parts = _cut(fused.packed, **fields)
            by_token = _by_token(parts, fields["top_k"])
            indices = {name: getattr(parts, name) for name in _INDEX_FIELDS}
            return cls(**fields, **indices, expert_indices=by_token, fused=fused)
        plan = object.__new__(cls)
        plan.__dict__.update(fields, fused=fused)
        return plan

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            known = self.__dict__
            if "fused" not in known or name not in (*_INDEX_FIELDS, "expert_indices"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            parts = self.packed_indices
            if name == "expert_indices":
                known[name] = _by_token(parts, self.top_k)
            else:
                known.update((field, getattr(parts, field)) for field in _INDEX_FIELDS)
            return known[name]

    @property
    def packed_indices(self) -> PlanIndices:
        """The parts of ``fused.packed``."""
        assert self.fused is not None
        sizes = (self.num_tokens, self.num_experts, self.num_groups, self.num_rows)
        return unpack(self.fused.packed, packed_sizes(*sizes, self.top_k or 0))

    @property
    def router_probs(self) -> Tensor:
        """(T, E) affinities of the logits, differentiable; computed on request."""
        from moe_kernels.backends import resolve

        compute = resolve("router_probs", self.router_logits.device, self.backend)
        return compute(self.router_logits, self.affinity)

    @property
    def num_rows(self) -> int:
        """R, known on the host."""
        return self.routing_weights.shape[0]

    @property
    def rows_per_expert(self) -> int | None:
        """Rows of every expert when they are equal by construction (expert choice), else None."""
        return None if self.capacity is None else self.num_groups * self.capacity

    @property
    def experts_per_token(self) -> Tensor:
        """(T,) int32, how many experts process each token."""
        return self.row_offsets.diff()

    @property
    def expert_of_row(self) -> Tensor:
        """(R,) int32, the expert that owns each row."""
        rows = torch.arange(self.num_rows, dtype=torch.int32, device=self.expert_offsets.device)
        return torch.searchsorted(self.expert_offsets[1:], rows, right=True, out_int32=True)

    @property
    def stats(self) -> "RoutingStats":
        """Telemetry of this plan, computed on request; see ``moe_kernels.routing_stats``."""
        from moe_kernels.telemetry import routing_stats

        return routing_stats(self)

    def validate(self) -> "RoutingPlan":
        """Check every invariant of the plan and return it; reads the tensors on the host.

        Raises:
            ValueError: names the first invariant that does not hold.
        """
        _check_layout(self)
        _check_rows(self)
        _check_inverse(self)
        if self.router == "expert_choice":
            _check_expert_choice(self)
        elif self.router == "token_choice":
            _check_token_choice(self)
        else:
            _check_ascending_tokens(self)
        return self


_INDEX_FIELDS = (
    "token_indices",
    "expert_offsets",
    "tokens_per_expert",
    "row_indices",
    "row_offsets",
)


def _cut(
    packed: Tensor,
    *,
    num_tokens: int,
    num_experts: int,
    num_groups: int,
    routing_weights: Tensor,
    top_k: int | None,
    **_: Any,
) -> PlanIndices:
    rows = routing_weights.shape[0]
    return unpack(packed, packed_sizes(num_tokens, num_experts, num_groups, rows, top_k or 0))


def _by_token(parts: PlanIndices, top_k: int | None) -> Tensor | None:
    return None if top_k is None else parts.expert_indices.view(-1, top_k)


def _require(condition: bool | Tensor, invariant: str) -> None:
    if not bool(condition):
        raise ValueError(f"RoutingPlan is inconsistent: {invariant} does not hold.")


def _check_layout(plan: RoutingPlan) -> None:
    tokens, experts, rows = plan.num_tokens, plan.num_experts, plan.num_rows
    shapes: dict[str, tuple[int, ...]] = {
        "routing_weights": (rows,),
        "token_indices": (rows,),
        "expert_offsets": (experts + 1,),
        "tokens_per_expert": (experts,),
        "row_indices": (rows,),
        "row_offsets": (tokens + 1,),
    }
    if plan.affinity != "given":
        shapes |= {"router_logits": (tokens, experts), "router_probs": (tokens, experts)}
    for name, shape in shapes.items():
        tensor = getattr(plan, name)
        _require(tuple(tensor.shape) == shape, f"{name} of shape {tuple(tensor.shape)} == {shape}")
        if name.startswith(("router_", "routing_")):
            _require(tensor.dtype in (torch.float32, torch.float64), f"{name} is fp32 or fp64")
        else:
            _require(tensor.dtype == torch.int32, f"{name} is int32")


def _check_rows(plan: RoutingPlan) -> None:
    offsets = plan.expert_offsets
    _require(offsets[0] == 0, "expert_offsets[0] == 0")
    _require(offsets[-1] == plan.num_rows, f"expert_offsets[-1] == num_rows = {plan.num_rows}")
    _require((offsets.diff() >= 0).all(), "expert_offsets never falls")
    _require(
        (offsets.diff() == plan.tokens_per_expert).all(), "tokens_per_expert == offsets.diff()"
    )
    inside = (plan.token_indices >= 0) & (plan.token_indices < plan.num_tokens)
    _require(inside.all(), f"0 <= token_indices < num_tokens = {plan.num_tokens}")


def _check_inverse(plan: RoutingPlan) -> None:
    every_row = torch.arange(plan.num_rows, device=plan.row_indices.device)
    _require(
        (plan.row_indices.long().sort().values == every_row).all(), "row_indices permutes the rows"
    )
    _require(plan.row_offsets[0] == 0, "row_offsets[0] == 0")
    _require((plan.row_offsets.diff() >= 0).all(), "row_offsets never falls")
    tokens = torch.arange(plan.num_tokens, device=plan.row_indices.device)
    owner = tokens.repeat_interleave(plan.experts_per_token.long())
    _require(owner.shape[0] == plan.num_rows, "row_offsets[-1] == num_rows")
    _require(
        (plan.token_indices[plan.row_indices.long()] == owner).all(),
        "token_indices[row_indices] lists each token's rows",
    )
    same_token = owner[1:] == owner[:-1]
    rising = plan.row_indices[1:] > plan.row_indices[:-1]
    _require((rising | ~same_token).all(), "the rows of a token ascend")


def _check_expert_choice(plan: RoutingPlan) -> None:
    _require(plan.capacity is not None, "expert choice has a capacity")
    assert plan.capacity is not None
    shape = (plan.num_experts, plan.num_groups, plan.capacity)
    _require(plan.num_rows == shape[0] * shape[1] * shape[2], f"num_rows == E·G·C = {shape}")
    chosen = plan.token_indices.view(shape)
    _require(
        (chosen.diff(dim=-1) > 0).all(), "tokens of an expert and group are distinct, ascending"
    )
    if plan.num_rows:
        group = chosen // (plan.num_tokens // plan.num_groups)
        expected = torch.arange(plan.num_groups, device=chosen.device).view(1, -1, 1)
        _require((group == expected).all(), "each expert takes C tokens from every group")


def _check_token_choice(plan: RoutingPlan) -> None:
    _require(plan.top_k is not None, "token choice has a top_k")
    assert plan.top_k is not None
    _require(plan.expert_indices is not None, "token choice has expert_indices")
    assert plan.expert_indices is not None
    _require((plan.experts_per_token == plan.top_k).all(), f"every token has top_k = {plan.top_k}")
    _check_ascending_tokens(plan)
    experts = plan.expert_of_row
    by_token = experts[plan.row_indices.long()].view(plan.num_tokens, plan.top_k)
    _require(
        (plan.expert_indices.sort(dim=-1).values == by_token).all(), "expert_indices name the rows"
    )


def _check_ascending_tokens(plan: RoutingPlan) -> None:
    experts = plan.expert_of_row
    same_expert = experts[1:] == experts[:-1]
    rising = plan.token_indices[1:] > plan.token_indices[:-1]
    _require((rising | ~same_expert).all(), "the tokens of an expert are distinct and ascend")
