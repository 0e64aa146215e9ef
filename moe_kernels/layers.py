"""``nn.Module`` s: routers, grouped experts, and the MoE layer that is built from them."""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.backends import resolve
from moe_kernels.checks import check_choice, check_floating, check_positive_int
from moe_kernels.expert_mlp import ACTIVATIONS, expert_mlp
from moe_kernels.plan import RoutingPlan
from moe_kernels.router import expert_choice, token_choice

if TYPE_CHECKING:
    from moe_kernels.distributed.expert_parallel import ParallelRun
    from moe_kernels.distributed.pools import SharedPool


class LinearRouter(nn.Module):
    """What routers share: a linear map without bias, in fp32 whatever the input and autocast say.

    Args:
        hidden_size: D of the tokens that are routed.
        num_experts: E.
        in_features: width of what ``logits`` reads; D where it reads the tokens.

    Attributes:
        pools_batch: whether all tokens of a batch compete in training; such a router chooses from
            ``training_pool`` where there is one.
        shared_pool: set by ``moe_kernels.distributed.share_pools``.
    """

    routing: dict[str, Any]
    pools_batch: bool = False
    shared_pool: "SharedPool | None" = None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        in_features: int | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("hidden_size", hidden_size)
        check_positive_int("num_experts", num_experts)
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        width = hidden_size if in_features is None else in_features
        self.weight = nn.Parameter(torch.empty(num_experts, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform with a = sqrt(5), the default of ``nn.Linear``."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def logits(self, x: Tensor) -> Tensor:
        """(B, S, D) tokens to (B·S, E) router logits in fp32 (fp64 for fp64 tokens)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.flatten(0, -2).to(dtype), self.weight.to(dtype))

    @property
    def training_pool(self) -> "SharedPool | None":
        """The pool of all ranks; ``None`` without one, and in ``eval()``."""
        return self.shared_pool if self.training else None


class ExpertChoiceRouter(LinearRouter):
    """Each expert chooses its tokens, inside each image by default.

    Args:
        hidden_size: D.
        num_experts: E.
        capacity_factor: f_c, average experts per token.
        capacity: C itself instead of ``capacity_factor``.
        group: the pool an expert chooses from: ``"image"`` (each of the B sequences; the output of
            an image does not depend on its batch), ``"batch"`` (all B·S tokens), or a number of
            tokens that divides B·S.
        affinity, normalize, scale, rounding, multiple_of, check_finite: see
            ``moe_kernels.expert_choice``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        capacity_factor: float | None = None,
        *,
        capacity: int | None = None,
        group: str | int = "image",
        affinity: str = "softmax",
        normalize: str = "none",
        scale: float = 1.0,
        rounding: str = "floor",
        multiple_of: int = 1,
        check_finite: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, device, dtype)
        if isinstance(group, int):
            check_positive_int("group", group)
        else:
            check_choice("group", group, ("image", "batch"))
        if capacity is None and capacity_factor is None:
            capacity_factor = 2.0
        self.capacity_factor = capacity_factor
        self.group = group
        self.pools_batch = group == "batch"
        self.routing = {
            "capacity": capacity,
            "affinity": affinity,
            "normalize": normalize,
            "scale": scale,
            "rounding": rounding,
            "multiple_of": multiple_of,
            "check_finite": check_finite,
        }

    def forward(self, x: Tensor) -> RoutingPlan:
        """Route (B, S, D) tokens."""
        batch_size, seq_len = x.shape[:2]
        num_groups = num_pools(self.group, batch_size, seq_len)
        options: dict[str, Any] = self.routing
        if (pool := self.training_pool) is not None:
            return pool.expert_choice(self.logits(x), self.capacity_factor, **options)
        return expert_choice(self.logits(x), self.capacity_factor, num_groups=num_groups, **options)

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, {self.num_experts}, capacity_factor={self.capacity_factor}, "
            f"group={self.group!r}"
        )


def num_pools(group: str | int, batch_size: int, seq_len: int) -> int:
    """Pools that experts choose from: G of ``expert_choice`` for the ``group`` of a router.

    Raises:
        ValueError: a number of tokens that does not divide those given.
    """
    if group == "image":
        return max(batch_size, 1)
    if group == "batch":
        return 1
    assert isinstance(group, int)
    if (batch_size * seq_len) % group:
        raise ValueError(
            f"group is {group} tokens, which does not divide the {batch_size} x {seq_len} "
            'tokens given; choose a divisor, "image" or "batch".'
        )
    return max(batch_size * seq_len // group, 1)


class TokenChoiceRouter(LinearRouter):
    """Each token chooses its K best experts.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K.
        selection_bias: keep an (E,) buffer ``selection_bias``, zero at first, that is added to the
            affinities for the selection only (for loss-free balancing).
        affinity, normalize, scale, num_expert_groups, top_k_groups, check_finite: see
            ``moe_kernels.token_choice``.
    """

    selection_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        affinity: str = "softmax",
        normalize: str = "none",
        scale: float = 1.0,
        selection_bias: bool = False,
        num_expert_groups: int = 1,
        top_k_groups: int | None = None,
        check_finite: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, device, dtype)
        self.top_k = top_k
        self.routing = {
            "affinity": affinity,
            "normalize": normalize,
            "scale": scale,
            "num_expert_groups": num_expert_groups,
            "top_k_groups": top_k_groups,
            "check_finite": check_finite,
        }
        bias = torch.zeros(num_experts, device=device, dtype=dtype) if selection_bias else None
        self.register_buffer("selection_bias", bias)

    def forward(self, x: Tensor) -> RoutingPlan:
        """Route (B, S, D) tokens."""
        options: dict[str, Any] = self.routing
        return token_choice(
            self.logits(x),
            self.top_k,
            selection_bias=self.selection_bias,
            num_groups=max(x.shape[0], 1),
            **options,
        )

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.num_experts}, top_k={self.top_k}"


class GroupedExperts(nn.Module):
    """E two-matrix MLPs with stacked weights.

    Parameters: ``up_proj`` (E, F, D), or for ``"swiglu"`` ``gate_up_proj`` (E, 2F, D) with the gate
    half first; ``down_proj`` (E, D, F); with ``bias=True`` also ``up_proj_bias`` (E, F) or
    ``gate_up_proj_bias`` (E, 2F), and ``down_proj_bias`` (E, D).

    Args:
        hidden_size: D.
        intermediate_size: F.
        num_experts: E.
        activation: ``"gelu_tanh"``, ``"gelu"`` or ``"swiglu"``.
        bias: whether both projections have biases.
    """

    up_proj_bias: Tensor | None
    gate_up_proj_bias: Tensor | None
    down_proj_bias: Tensor | None
    # How to run when each rank has its own experts: ``moe_kernels.distributed.shard_experts``.
    parallel: "ParallelRun | None" = None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        activation: str = "gelu_tanh",
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        for name, size in (
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
            ("num_experts", num_experts),
        ):
            check_positive_int(name, size)
        self.activation = activation
        self._in_name = "gate_up_proj" if activation == "swiglu" else "up_proj"
        rows_in = 2 * intermediate_size if activation == "swiglu" else intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.register_parameter(self._in_name, parameter(num_experts, rows_in, hidden_size))
        self.down_proj = parameter(num_experts, hidden_size, intermediate_size)
        self.register_parameter(
            f"{self._in_name}_bias", parameter(num_experts, rows_in) if bias else None
        )
        self.register_parameter(
            "down_proj_bias", parameter(num_experts, hidden_size) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as Xavier-uniform ``nn.Linear`` matrices (gate and up apart), zero biases."""
        if self.parallel is not None:
            self.parallel.reset_parameters(self)
            return
        w_in = self.get_parameter(self._in_name)
        halves = w_in.chunk(2, dim=1) if self.activation == "swiglu" else (w_in,)
        with torch.no_grad():
            for expert in range(w_in.shape[0]):
                for half in halves:
                    nn.init.xavier_uniform_(half[expert])
                nn.init.xavier_uniform_(self.down_proj[expert])
        for bias in (getattr(self, f"{self._in_name}_bias"), self.down_proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self,
        x: Tensor,
        plan: RoutingPlan,
        shared: Tensor | Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """(T, D) tokens and their plan to (T, D), with ``shared`` (T, D) added.

        A function in its place is called for it; parallel experts do so while rows travel.
        """
        if self.parallel is not None:
            return self.parallel(self, x, plan, shared)
        term = shared() if callable(shared) else shared
        return self.compute(x, plan, self.weights(), term)

    def weights(self) -> list[Tensor | None]:
        """``w_in``, ``w_out``, ``bias_in`` and ``bias_out`` of ``expert_mlp``."""
        return [
            getattr(self, self._in_name),
            self.down_proj,
            getattr(self, f"{self._in_name}_bias"),
            self.down_proj_bias,
        ]

    def compute(
        self,
        x: Tensor,
        plan: RoutingPlan,
        weights: list[Any],
        shared: Tensor | None = None,
    ) -> Tensor:
        """``forward`` with the weights that are given, for the plan's experts."""
        w_in, w_out, bias_in, bias_out = weights
        return expert_mlp(
            x,
            plan,
            w_in,
            w_out,
            activation=self.activation,
            bias_in=bias_in,
            bias_out=bias_out,
            shared=shared,
        )

    def extra_repr(self) -> str:
        experts, hidden_size, intermediate_size = self.down_proj.shape
        return f"{hidden_size}, {intermediate_size}, {experts}, activation={self.activation!r}"


class SharedExpert(nn.Module):
    """A dense MLP that every token passes: ``down_proj(act(up_proj(x)))``.

    Parameters are named as in ``GroupedExperts``, on ``nn.Linear`` s.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        bias: bool,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self._in_name = "gate_up_proj" if activation == "swiglu" else "up_proj"
        rows_in = 2 * intermediate_size if activation == "swiglu" else intermediate_size
        in_proj = nn.Linear(hidden_size, rows_in, bias, device=device, dtype=dtype)
        self.add_module(self._in_name, in_proj)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices (gate and up apart), zero biases."""
        in_proj: nn.Linear = getattr(self, self._in_name)
        halves = in_proj.weight.chunk(2) if self.activation == "swiglu" else (in_proj.weight,)
        with torch.no_grad():
            for matrix in (*halves, self.down_proj.weight):
                nn.init.xavier_uniform_(matrix)
        for linear in (in_proj, self.down_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        h = getattr(self, self._in_name)(x)
        activate = resolve("activation", h.device)
        return self.down_proj(activate(h, self.activation))


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer: route, experts, combine, plus a shared expert.

    ``out = expert_mlp(x, router(x)) + shared_expert(x)``.

    Args:
        hidden_size: D.
        intermediate_size: F of each expert.
        num_experts: E.
        router: an ``ExpertChoiceRouter``, ``TokenChoiceRouter`` or other ``LinearRouter`` for the
            same D and E; by default ``ExpertChoiceRouter(hidden_size, num_experts)``.
        activation: ``"gelu_tanh"``, ``"gelu"`` or ``"swiglu"``, also of the shared expert.
        bias: biases in both projections of every expert.
        shared_intermediate_size: F of a dense MLP that every token passes; 0 for none.

    Raises:
        ValueError: when the router was built for other sizes, or a size is not positive.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        router: LinearRouter | None = None,
        activation: str = "gelu_tanh",
        bias: bool = False,
        shared_intermediate_size: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if router is None:
            router = ExpertChoiceRouter(hidden_size, num_experts, device=device, dtype=dtype)
        if (router.hidden_size, router.num_experts) != (hidden_size, num_experts):
            raise ValueError(
                f"router was built for hidden_size {router.hidden_size} and num_experts "
                f"{router.num_experts}; the layer has {hidden_size} and {num_experts}."
            )
        self.router = router
        self.experts = GroupedExperts(
            hidden_size,
            intermediate_size,
            num_experts,
            activation,
            bias,
            device=device,
            dtype=dtype,
        )
        self.shared_expert: SharedExpert | None = None
        if shared_intermediate_size:
            check_positive_int("shared_intermediate_size", shared_intermediate_size)
            self.shared_expert = SharedExpert(
                hidden_size, shared_intermediate_size, activation, bias, device=device, dtype=dtype
            )

    def reset_parameters(self) -> None:
        """Re-initialise router, experts and shared expert."""
        self.router.reset_parameters()
        self.experts.reset_parameters()
        if self.shared_expert is not None:
            self.shared_expert.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, RoutingPlan]:
        """Process (B, S, D) tokens.

        Returns:
            (B, S, D) in the dtype of ``x``, and the ``RoutingPlan``: pass it to the losses, read
            its ``stats``.
        """
        check_floating("x", x, 3, "(batch_size, seq_len, hidden_size)")
        if x.shape[2] != self.router.hidden_size:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (batch_size, seq_len, "
                f"{self.router.hidden_size})."
            )
        plan = self.router(x)
        tokens = x.flatten(0, 1)
        return self.experts(tokens, plan, self.shared_term(tokens)).view_as(x), plan

    def shared_term(self, tokens: Tensor) -> Tensor | Callable[[], Tensor] | None:
        """The shared expert's output for (T, D) tokens, which the experts add to theirs.

        Parallel experts get a function instead: they call it while rows travel.
        """
        if self.shared_expert is None:
            return None
        if self.experts.parallel is not None:
            return partial(self.shared_expert, tokens)
        return self.shared_expert(tokens)
