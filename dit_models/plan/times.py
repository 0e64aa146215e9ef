"""Seconds of a step at stated rates, and which mesh to take."""

from collections.abc import Sequence
from dataclasses import dataclass

from dit_models.count import count_macs
from dit_models.plan.memory import Memory, plan_memory
from dit_models.plan.mesh import Mesh
from dit_models.plan.settings import Cluster, Run
from dit_models.plan.traffic import Flow, Traffic, plan_traffic

# Estimates closer than this are the same; that which depends least on overlap is taken.
SAME_TIME = 0.05


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
    """Of those that fit and are about as fast as the fastest, the fastest without overlap."""
    fitting = [each for each in estimates if each.fits]
    if not fitting:
        return None
    fastest = min(each.with_overlap for each in fitting)
    as_fast = [each for each in fitting if each.with_overlap <= fastest * (1 + SAME_TIME)]
    return min(as_fast, key=lambda each: (each.without_overlap, each.memory.total))


def break_even_images(run: Run) -> float:
    """Images a GPU below which sending rows takes fewer bytes than gathering the experts.

    A layer sends 4 B S k D numbers (twice there and back) and ``fully_shard`` gathers its experts
    twice and reduces them once, 3 E m D F with m matrices an expert; so B < 3 E m F / (4 S k).
    """
    config = run.model
    matrices = 3 if config.expert_activation == "swiglu" else 2
    per_token = config.routing_idea.experts_per_token(config, config.own_routing_options, 0)
    weights = 3 * config.num_experts * matrices * config.expert_intermediate_size
    return weights / (4 * config.seq_len * float(per_token))
