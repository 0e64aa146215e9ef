"""Seconds of a step at stated rates, and which mesh to take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dit_models.count import count_macs
from dit_models.plan.memory import Memory, plan_memory
from dit_models.plan.mesh import Mesh
from dit_models.plan.settings import Cluster, Run
from dit_models.plan.traffic import Flow, Traffic, plan_traffic
from dit_models.plan.units import FP32

# Estimates closer than this are the same.
SAME = 0.05


@dataclass(frozen=True)
class Estimate:
    """A mesh with what it takes.

    Attributes:
        mesh: how processes are divided.
        recompute: activation checkpointing of every block.
        memory: of a process at its fullest moment.
        traffic: of a process in a step.
        compute: seconds of the matrix products.
        hidden: seconds of the exchanges that can go on meanwhile.
        exposed: seconds of those that a block waits for.
        fits: whether the memory fits what is usable.
    """

    mesh: Mesh
    recompute: bool
    memory: Memory
    traffic: Traffic
    compute: float
    hidden: float
    exposed: float
    fits: bool

    @property
    def with_overlap(self) -> float:
        """Seconds of a step where everything that can be hidden is hidden."""
        return max(self.compute, self.hidden) + self.exposed

    @property
    def without_overlap(self) -> float:
        """Seconds of a step where one thing happens after the other."""
        return self.compute + self.hidden + self.exposed


def estimate(run: Run, cluster: Cluster, mesh: Mesh, recompute: bool) -> Estimate:
    """What a mesh takes."""
    memory = plan_memory(run, mesh, recompute)
    traffic = plan_traffic(run, mesh, cluster.gpus_per_node, recompute)
    times = {hidden: _seconds(traffic, cluster, hidden) for hidden in (True, False)}
    return Estimate(
        mesh=mesh,
        recompute=recompute,
        memory=memory,
        traffic=traffic,
        compute=compute_seconds(run, cluster, recompute),
        hidden=times[True],
        exposed=times[False],
        fits=memory.total <= cluster.usable_bytes,
    )


def compute_seconds(run: Run, cluster: Cluster, recompute: bool) -> float:
    """2 flops a multiply-accumulate, thrice (forward, two products backward), or 4 times."""
    size = run.model.image_size
    macs = count_macs(run.model, size, size, text_len=run.text_len, attention=True)
    flops = 2 * macs * run.images_per_gpu * run.accumulate * (4 if recompute else 3)
    return flops / (cluster.tflops * 1e12 * cluster.utilization)


def flow_seconds(flow: Flow, cluster: Cluster) -> float:
    """Of the slower of the two links, which work at the same time."""
    return max(flow.nvlink / cluster.nvlink_gb_s, flow.network / cluster.network_gb_s) / 1e9


def _seconds(traffic: Traffic, cluster: Cluster, hidden: bool) -> float:
    return sum(flow_seconds(flow, cluster) for flow in traffic.flows if flow.hidden == hidden)


def recommend(estimates: Sequence[Estimate]) -> Estimate | None:
    """Of those that fit: about the fastest, then with least need of overlap, bytes, memory."""
    left = [each for each in estimates if each.fits]
    left = _about_least(left, lambda each: each.with_overlap)
    left = _about_least(left, lambda each: each.without_overlap)
    left = _about_least(left, lambda each: each.traffic.nvlink + each.traffic.network)
    return min(left, key=lambda each: each.memory.total, default=None)


def _about_least(estimates: list[Estimate], value: Callable[[Estimate], float]) -> list[Estimate]:
    limit = (1 + SAME) * min(map(value, estimates), default=0.0)
    return [each for each in estimates if value(each) <= limit]


def break_even_images(run: Run) -> float:
    """Images a GPU below which sending rows takes fewer bytes than gathering the experts.

    A layer sends 4 B S k D numbers of b bytes (twice there and back). ``fully_shard`` gathers its
    E m D F weights (m matrices an expert) twice in b bytes and reduces them once in 4; so
    B < (2 b + 4) E m F / (4 b S k).
    """
    config, product = run.model, run.product_bytes
    matrices = 3 if config.expert_activation == "swiglu" else 2
    per_token = config.routing_idea.experts_per_token(config, config.own_routing_options, 0)
    gathered = (2 if run.reshard_after_forward else 1) * product
    weights = config.num_experts * matrices * config.expert_intermediate_size
    return (gathered + FP32) * weights / (4 * product * config.seq_len * float(per_token))
