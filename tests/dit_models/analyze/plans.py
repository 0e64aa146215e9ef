"""Plans of every kind for the tests, and an oracle that walks through their rows one by one."""

from dataclasses import replace

import numpy as np
import torch

import moe_kernels as mk
from dit_models.analyze.counts import RoutingCounts

IMAGES, TOKENS, EXPERTS = 3, 4, 5


def expert_choice(images: int = IMAGES, num_groups: int | None = None) -> mk.RoutingPlan:
    logits = torch.randn(images * TOKENS, EXPERTS)
    return mk.expert_choice(logits, 2.0, num_groups=num_groups or images)


def token_choice(images: int = IMAGES) -> mk.RoutingPlan:
    return mk.token_choice(torch.randn(images * TOKENS, EXPERTS), 2, affinity="sigmoid")


def ragged(images: int = IMAGES) -> mk.RoutingPlan:
    """As many rows an expert as it happens: none for expert 0, some tokens without an expert."""
    tokens = images * TOKENS
    chosen = torch.rand(tokens, EXPERTS) < 0.4
    chosen[:, 0] = False
    chosen[1] = False
    token_indices = chosen.T.nonzero()[:, 1]  # in expert order
    counts = chosen.sum(0, dtype=torch.int32)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])
    per_token = chosen.sum(1, dtype=torch.int32)
    plan = expert_choice(images)
    return replace(
        plan,
        capacity=None,
        fused=None,
        routing_weights=torch.rand(len(token_indices)),
        token_indices=token_indices.int(),
        expert_offsets=offsets,
        tokens_per_expert=counts,
        row_indices=torch.argsort(token_indices, stable=True).int(),
        row_offsets=torch.cat([per_token.new_zeros(1), per_token.cumsum(0, dtype=torch.int32)]),
    )


KINDS = {
    "expert_choice": expert_choice,
    "batch_pool": lambda images=IMAGES: expert_choice(images, num_groups=1),
    "token_choice": token_choice,
    "ragged": ragged,
}


def rows_of(plan: mk.RoutingPlan) -> list[tuple[int, int, float]]:
    """(token, expert, weight) of every row."""
    offsets = plan.expert_offsets.tolist()
    tokens, weights = plan.token_indices.tolist(), plan.routing_weights.tolist()
    return [
        (tokens[row], expert, weights[row])
        for expert in range(plan.num_experts)
        for row in range(offsets[expert], offsets[expert + 1])
    ]


class Oracle:
    """The sums of ``RoutingCounts``, counted row by row in plain Python."""

    def __init__(
        self,
        layers: int,
        steps: int,
        groups: int,
        tokens: int = TOKENS,
        experts: int = EXPERTS,
    ) -> None:
        def zeros(*shape: int, dtype: type = np.int64) -> np.ndarray:
            return np.zeros(shape, dtype)

        self._tokens = tokens
        self.images_by_group = zeros(groups)
        self.rows_by_group = zeros(layers, groups, experts)
        self.rows_by_position = zeros(layers, tokens, experts)
        self.rows_by_step = zeros(steps, layers, experts)
        self.tokens_by_count = zeros(steps, layers, experts + 1)
        self.experts_by_position = zeros(steps, layers, tokens)
        self.pairs = zeros(layers, experts, experts)
        self.weight_by_group = zeros(layers, groups, experts, dtype=float)
        self.weight_by_step = zeros(steps, layers, experts, dtype=float)

    def sums(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {name: value for name, value in vars(self).items() if name != "_tokens"}

    def add(self, step: int, layer: int, plan: mk.RoutingPlan, groups: list[int]) -> None:
        """Count the first ``len(groups)`` images of a plan."""
        experts_of: dict[int, set[int]] = {t: set() for t in range(len(groups) * self._tokens)}
        for token, expert, weight in rows_of(plan):
            if token not in experts_of:
                continue  # the unconditional half
            group = groups[token // self._tokens]
            self.rows_by_group[layer, group, expert] += 1
            self.rows_by_position[layer, token % self._tokens, expert] += 1
            self.rows_by_step[step, layer, expert] += 1
            self.experts_by_position[step, layer, token % self._tokens] += 1
            self.weight_by_group[layer, group, expert] += weight
            self.weight_by_step[step, layer, expert] += weight
            experts_of[token].add(expert)
        for experts in experts_of.values():
            self.tokens_by_count[step, layer, len(experts)] += 1
            for i in experts:
                for j in experts:
                    self.pairs[layer, i, j] += 1


def assert_same(counts: RoutingCounts, oracle: Oracle) -> None:
    """Integers exactly, routing weights to the rounding of float64 sums."""
    for name, expected in oracle.sums().items():
        found = getattr(counts, name).numpy()
        if name.startswith("weight"):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12, err_msg=name)
        else:
            assert found.dtype == np.int64, name
            np.testing.assert_array_equal(found, expected, err_msg=name)
