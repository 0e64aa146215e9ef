"""How processes can be divided: the meshes worth a look."""

from collections.abc import Iterator
from dataclasses import dataclass

from dit_models.plan.settings import Cluster


@dataclass(frozen=True)
class Mesh:
    """Ranks in the order (replicate, shard, expert), the last running fastest.

    Attributes:
        gpus: ranks W.
        expert: ranks that share the experts of a layer (``parallel.expert``).
        replicate: whole copies of the divided model (``parallel.replicate``).
    """

    gpus: int
    expert: int = 1
    replicate: int = 1

    def __post_init__(self) -> None:
        if self.gpus % (self.expert * self.replicate):
            raise ValueError(
                f"expert={self.expert} times replicate={self.replicate} does not divide "
                f"{self.gpus} GPUs; choose divisors."
            )

    @property
    def dense_shards(self) -> int:
        """Ranks that a parameter which is not an expert is divided among."""
        return self.gpus // self.replicate

    @property
    def expert_shards(self) -> int:
        """Ranks that the experts of one owner are divided among."""
        return self.dense_shards // self.expert

    def __str__(self) -> str:
        parts = f"{self.expert_shards} shard x {self.expert} expert"
        return parts if self.replicate == 1 else f"{self.replicate} replicate x {parts}"


def sensible_meshes(
    cluster: Cluster, num_experts: int, *, across_nodes: bool = False
) -> Iterator[Mesh]:
    """Meshes with experts inside a node and copies of whole nodes.

    Args:
        cluster: the machines.
        num_experts: E; 0 for a dense model.
        across_nodes: also experts that are shared by several nodes.
    """
    node = min(cluster.gpus, cluster.gpus_per_node)
    widest = cluster.gpus if across_nodes else node
    for replicate in _divisors(cluster.gpus // node):
        for expert in _divisors(num_experts) if num_experts else [1]:
            if expert <= widest and (cluster.gpus // replicate) % expert == 0:
                yield Mesh(cluster.gpus, expert, replicate)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
