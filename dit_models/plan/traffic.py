"""Bytes that one process sends in a step, over the links inside its node and between nodes."""

from dataclasses import dataclass

from dit_models.plan.activations import INT32, Widths
from dit_models.plan.mesh import Mesh
from dit_models.plan.settings import Run
from dit_models.plan.units import FP32, Unit, model_units


@dataclass(frozen=True)
class Flow:
    """One kind of exchange, summed over a step.

    Attributes:
        name: what travels.
        nvlink: bytes that a GPU sends inside its node.
        network: bytes that a GPU sends to other nodes.
        hidden: can go on while the GPU computes; a block waits for its experts' rows.
    """

    name: str
    nvlink: float
    network: float
    hidden: bool


@dataclass(frozen=True)
class Traffic:
    """All exchanges of a step."""

    flows: tuple[Flow, ...]

    @property
    def nvlink(self) -> float:
        """Bytes that a GPU sends inside its node."""
        return sum(flow.nvlink for flow in self.flows)

    @property
    def network(self) -> float:
        """Bytes that a GPU sends to other nodes."""
        return sum(flow.network for flow in self.flows)


def plan_traffic(run: Run, mesh: Mesh, gpus_per_node: int, recompute: bool = False) -> Traffic:
    """What a process sends in one step of ``run.accumulate`` micro-batches.

    Args:
        run: what is trained.
        mesh: how processes are divided; consecutive ones share a node.
        gpus_per_node: of a node.
        recompute: activation checkpointing, whose second forward sends the experts' rows again.
    """
    if mesh.gpus == 1:
        return Traffic(())
    units = model_units(run.model, mesh)
    experts = [block.experts for block in units.blocks if block.experts is not None]
    dense = [unit for unit in units.all if unit not in experts]
    flows = [
        *_sharding("dense", dense, run, mesh, gpus_per_node),
        *_sharding("expert", experts, run, mesh, gpus_per_node),
    ]
    if mesh.expert > 1:
        flows.extend(_exchange(run, mesh, gpus_per_node, recompute))
    return Traffic(tuple(flow for flow in flows if flow.nvlink or flow.network))


def _sharding(name: str, units: list[Unit], run: Run, mesh: Mesh, node: int) -> list[Flow]:
    """Gathers and reductions of ``fully_shard``."""
    if not units:
        return []
    members, stride = units[0].shards, units[0].stride
    weights = sum(_bytes(unit, run) for unit in units)
    again = sum(_bytes(unit, run) for unit in units if not unit.stays)
    gradients = sum(unit.gathered_numel for unit in units) * FP32
    kept = sum(unit.shard_numel for unit in units) * FP32
    times = run.accumulate
    gather = _ring(times * weights, members, stride, node)
    flows = [Flow(f"{name} all-gather, forward", *gather, True)]
    if run.reshard_after_forward:
        gather = _ring(times * again, members, stride, node)
        flows.append(Flow(f"{name} all-gather, backward", *gather, True))
    reduced = _ring(times * gradients, members, stride, node)
    flows.append(Flow(f"{name} reduce-scatter", *reduced, True))
    copies = _ring(2 * times * kept, mesh.replicate, mesh.dense_shards, node)
    flows.append(Flow(f"{name} all-reduce of copies", *copies, True))
    return flows


def _bytes(unit: Unit, run: Run) -> int:
    return unit.gathered_numel * (run.product_bytes if unit.reduced else FP32)


def _exchange(run: Run, mesh: Mesh, node: int, recompute: bool) -> list[Flow]:
    """Rows to their experts and back, forward and backward."""
    config, widths = run.model, Widths(run, mesh.expert)
    passes = (6 if recompute else 4) * run.accumulate
    rows = sum(widths.rows(layer) for layer in range(len(config.moe_blocks)))
    total = passes * rows * config.hidden_size * run.product_bytes
    flows = [Flow("expert all-to-all", *_all_to_all(total, mesh.expert, node), False)]
    if config.routing_idea.name != "expert_choice" or config.group != "image":
        counts = (2 if recompute else 1) * run.accumulate * len(config.moe_blocks)
        counts *= config.num_experts * INT32
        flows.append(Flow("row counts", *_all_to_all(counts, mesh.expert, node), False))
    return flows


def _ring(total: float, members: int, stride: int, node: int) -> tuple[float, float]:
    """Inside a node and between nodes, for each member of a ring through which ``total`` goes.

    Of the members in one node one passes to the next node; over many rings each in its turn.
    """
    sent = total * (members - 1) / members
    together = min(members, max(1, node // stride))
    if together == members:
        return sent, 0.0
    return (sent if together > 1 else 0.0), sent / together


def _all_to_all(total: float, members: int, node: int) -> tuple[float, float]:
    together = min(members, node)
    return total * (together - 1) / members, total * (members - together) / members
