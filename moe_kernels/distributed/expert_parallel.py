"""Expert parallelism: each rank of a mesh keeps its experts, and rows travel to them and back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moe_kernels.autocast import autocast_operands
from moe_kernels.checks import check_choice
from moe_kernels.combine import combine
from moe_kernels.dispatch import check_tokens, dispatch
from moe_kernels.distributed import deepep
from moe_kernels.distributed.exchange import Counts, Splits, Travel
from moe_kernels.distributed.local_plan import ragged_plan, static_plan
from moe_kernels.layers import GroupedExperts
from moe_kernels.plan import RoutingPlan

TRANSPORTS = ("auto", "static", "ragged", "deepep")


def shard_experts(module: nn.Module, mesh: DeviceMesh, *, transport: str = "auto") -> int:
    """Keep of every ``GroupedExperts`` in ``module`` this rank's experts, and run them parallel.

    Rank w of W keeps experts ``w·E/W`` to ``(w + 1)·E/W - 1`` as ``DTensor`` parameters,
    ``Shard(0)`` over the mesh, cut from the full weights without communication: all ranks must
    hold the same. Names do not change, nor does the shape that a ``DTensor`` shows. From then on
    the layer sends rows to the ranks that own their experts and gets them back, so all ranks must
    call it equally often. Call this before an optimizer is made, and before ``fully_shard``.

    Args:
        module: a model, on any device, ``meta`` too.
        mesh: one dimension, that of the experts; of size 1 nothing is sent.
        transport: ``"ragged"`` exchanges the numbers of rows first, which waits for the device.
            ``"static"`` needs a plan with equally many rows for each expert, and as many on every
            rank (expert choice inside images, equally many images a rank), and exchanges and waits
            for nothing. ``"auto"`` is static where the plan says equal (``rows_per_expert``).
            ``"deepep"`` is for token choice in bf16 on GPUs with that library.

    Returns:
        How many layers were changed.

    Raises:
        ValueError: E is not a multiple of W, the experts are parallel already or of a class with
            a forward of its own, the mesh has several dimensions, or the transport is not there;
            nothing was changed.
    """
    check_choice("transport", transport, TRANSPORTS)
    if transport == "deepep":
        deepep.load()
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names}; expected the one of the "
            'experts: mesh["expert"].'
        )
    layers = {n: m for n, m in module.named_modules() if isinstance(m, GroupedExperts)}
    for name, layer in layers.items():
        _check_layer(name, layer, mesh)
    for layer in layers.values():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            layer.register_parameter(name, _own_part(parameter, mesh))
        layer.parallel = ParallelRun(transport)
    return len(layers)


def _check_layer(name: str, layer: GroupedExperts, mesh: DeviceMesh) -> None:
    where = name or type(layer).__name__
    num_experts, world_size = layer.down_proj.shape[0], mesh.size()
    if layer.parallel is not None:
        raise ValueError(f"{where}: its experts are parallel already.")
    if type(layer).forward is not GroupedExperts.forward:
        raise ValueError(
            f"{where}: {type(layer).__name__} has a forward of its own, which cannot run parallel; "
            "expert parallelism needs an activation of moe_kernels.GroupedExperts."
        )
    if num_experts % world_size:
        raise ValueError(
            f"{where} has {num_experts} experts, which {world_size} ranks cannot share equally; "
            f"choose an expert dimension that divides {num_experts}."
        )


def _own_part(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    each = parameter.shape[0] // mesh.size()
    first = mesh.get_local_rank() * each
    # A copy, so that the memory of the others is given back.
    part = parameter.detach()[first : first + each].clone(memory_format=torch.contiguous_format)
    sharded = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
    return nn.Parameter(sharded, requires_grad=parameter.requires_grad)


@dataclass(frozen=True)
class ParallelRun:
    """How a ``GroupedExperts`` whose weights are sharded runs: the value of its ``parallel``.

    Attributes:
        transport: as in ``shard_experts``.
    """

    transport: str

    def __call__(
        self,
        experts: GroupedExperts,
        x: Tensor,
        plan: RoutingPlan,
        shared: Tensor | Callable[[], Tensor] | None,
    ) -> Tensor:
        """As ``GroupedExperts.forward``; ``shared`` may be a function, called on the way."""
        group = _group(experts)
        if distributed.get_world_size(group) == 1:
            term = shared() if callable(shared) else shared
            return experts.compute(x, plan, _local_weights(experts), term)
        if self.transport == "deepep":
            _check_input(experts, x, plan, self.transport, group)
            return deepep.run(experts, _local_weights(experts), x, plan, shared, group)
        journey = _send(experts, x, plan, self.transport)
        term = shared() if callable(shared) else shared
        return _return(experts, journey, term)

    def reset_parameters(self, experts: GroupedExperts) -> None:
        """Give each expert the weights that it would get with the full layer, for the same seed."""
        one = GroupedExperts(
            *(experts.down_proj.shape[1], experts.down_proj.shape[2], 1, experts.activation),
            bias=experts.down_proj_bias is not None,
            device="meta",
            dtype=experts.down_proj.dtype,
        ).to_empty(device=_local(experts.down_proj).device)
        group = _group(experts)
        each = _local(experts.down_proj).shape[0]
        first = distributed.get_rank(group) * each
        with torch.no_grad():
            for expert in range(experts.down_proj.shape[0]):
                one.reset_parameters()
                if first <= expert < first + each:
                    for name, drawn in one.named_parameters():
                        _local(experts.get_parameter(name))[expert - first] = drawn[0]


@dataclass(eq=False)
class _Journey:
    """Rows on the way to their experts, and what is needed when they arrive."""

    x: Tensor
    plan: RoutingPlan
    splits: Splits
    counts: Tensor | None
    travel: Travel


# What follows is not traced: nothing in it could be fused, and a compiled graph would have to know
# the sizes of what arrives. Between the two the compiler sees the shared expert.
@torch.compiler.disable
def _send(experts: GroupedExperts, x: Tensor, plan: RoutingPlan, transport: str) -> _Journey:
    group = _group(experts)
    _check_input(experts, x, plan, transport, group)
    is_static = plan.rows_per_expert is not None and transport != "ragged"
    counts = None if is_static else Counts(plan.tokens_per_expert, group)
    # In the dtype of the products: what autocast would cast after the journey is cast before.
    (tokens,) = autocast_operands(x)
    rows = dispatch(tokens, plan)  # (R, D), by expert and so by owner
    splits = _equal_splits(plan, group) if counts is None else counts.splits()
    travel = Travel(rows, splits, "rows to experts")
    return _Journey(x, plan, splits, None if counts is None else counts.received, travel)


@torch.compiler.disable
def _return(experts: GroupedExperts, journey: _Journey, shared: Tensor | None) -> Tensor:
    arrived = journey.travel.wait()
    splits, plan = journey.splits, journey.plan
    if journey.counts is None:
        world_size = len(splits.receives)
        rows_per_expert = plan.rows_per_expert
        assert rows_per_expert is not None
        local = static_plan(
            world_size, plan.num_experts // world_size, rows_per_expert, arrived.device
        )
    else:
        local = ragged_plan(journey.counts, arrived.shape[0])
    back = Travel(
        experts.compute(arrived, local, _local_weights(experts)),
        splits.reverse(),
        "rows from experts",
    )
    rows = back.wait()  # (R, D)
    x = journey.x
    if rows.dtype == x.dtype:
        term = None if shared is None else shared.to(x.dtype)
        return combine(rows, plan, shared=term)
    out = combine(rows, plan).to(x.dtype)
    return out if shared is None else out + shared.to(x.dtype)


def _equal_splits(plan: RoutingPlan, group: distributed.ProcessGroup) -> Splits:
    world_size = distributed.get_world_size(group)
    each = [plan.num_rows // world_size] * world_size
    return Splits(group, each, each, are_equal=True)


def _check_input(
    experts: GroupedExperts,
    x: Tensor,
    plan: RoutingPlan,
    transport: str,
    group: distributed.ProcessGroup,
) -> None:
    """Raise what this rank alone can see, before anything is sent."""
    check_tokens(x, plan)
    num_experts, hidden_size, _ = experts.down_proj.shape
    world_size = distributed.get_world_size(group)
    if plan.num_experts != num_experts:
        raise ValueError(
            f"the plan is for {plan.num_experts} experts; the layer has {num_experts}, "
            f"{num_experts // world_size} on each of {world_size} ranks."
        )
    if x.shape[1] != hidden_size:
        raise ValueError(f"x has {x.shape[1]} columns; the experts expect {hidden_size}.")
    if transport == "static" and plan.rows_per_expert is None:
        raise ValueError(
            "the static transport needs equally many rows for every expert, as expert choice "
            f'gives; this plan of router {plan.router!r} needs transport="ragged" or "auto".'
        )
    (tokens,) = autocast_operands(x)
    if tokens.dtype != experts.down_proj.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"x is {x.dtype} and the experts are {experts.down_proj.dtype}; expected one dtype "
            "(or autocast)."
        )


def _group(experts: GroupedExperts) -> distributed.ProcessGroup:
    mesh = _sharded(experts.down_proj).device_mesh
    if mesh.ndim != 1:
        raise ValueError(
            f"the experts are still sharded over {mesh.mesh_dim_names}; call the module that "
            "fully_shard was given, so that it gathers them."
        )
    return mesh.get_group()


def _sharded(weight: Tensor) -> DTensor:
    if not isinstance(weight, DTensor):
        raise ValueError(
            f"an expert weight of shape {tuple(weight.shape)} is no DTensor any more, but the "
            "layer runs expert parallel; load weights with load_state_dict, without assign=True."
        )
    return weight


def _local(weight: Tensor) -> Tensor:
    return _sharded(weight).to_local()


def _local_weights(experts: GroupedExperts) -> list[Tensor | None]:
    return [None if weight is None else _local(weight) for weight in experts.weights()]
