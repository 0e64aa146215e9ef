"""Counts of routing decisions, added up over the steps and batches of a drawing."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import moe_kernels as mk


class ByToken(NamedTuple):
    """A plan as tables of tokens by experts.

    Attributes:
        chosen: (n, S, E) int64, 1 where the expert processes the token, else 0.
        weights: (n, S, E) float32, the routing weight there, else 0.
    """

    chosen: Tensor
    weights: Tensor


def by_token(plan: mk.RoutingPlan, images: int, tokens: int) -> ByToken:
    """Tables of a plan's first ``images`` images of ``tokens`` tokens each.

    Read from ``token_indices``, ``expert_of_row`` and ``routing_weights`` alone, so that it holds
    for every router and for any number of rows an expert. Nothing is asked of the device.

    Raises:
        ValueError: when the plan has fewer tokens than that.
    """
    wanted = images * tokens
    if plan.num_tokens < wanted:
        raise ValueError(
            f"the plan routes {plan.num_tokens} tokens; expected at least {images} images of "
            f"{tokens} tokens."
        )
    shape = (wanted + 1, plan.num_experts)  # the last line takes the rows of other images
    where = (plan.token_indices.long().clamp(max=wanted), plan.expert_of_row.long())
    device = plan.token_indices.device
    chosen = torch.zeros(shape, dtype=torch.int64, device=device)
    chosen = chosen.index_put(where, chosen.new_ones(()))
    weights = torch.zeros(shape, dtype=torch.float32, device=device)
    weights = weights.index_put(where, plan.routing_weights.detach().float())
    cut = (images, tokens, plan.num_experts)
    return ByToken(chosen[:wanted].view(cut), weights[:wanted].view(cut))


def token_entropy(plan: mk.RoutingPlan, images: int, tokens: int) -> Tensor:
    """(n, S) entropy of the routing distribution of each token, in nats, 0 to log E.

        H[t] = -Σ_e p[t, e] log p[t, e]

    p is the softmax of the logits; for sigmoid affinity the affinities divided by their sum. NaN
    for a plan without logits (``plan_from_choices``).
    """
    wanted = images * tokens
    if plan.router_logits.shape[1] != plan.num_experts:
        return plan.routing_weights.new_full((images, tokens), torch.nan, dtype=torch.float32)
    logits = plan.router_logits.detach()[:wanted].float()
    if plan.affinity == "sigmoid":
        probs = logits.sigmoid()
        probs = probs / probs.sum(dim=1, keepdim=True).clamp_min(1e-30)
    else:
        probs = logits.softmax(dim=1)
    return -torch.special.xlogy(probs, probs).sum(dim=1).view(images, tokens)


class RoutingCounts:
    """Sums over images; memory does not grow with their number.

    The int64 sums are exact, whatever the batches were. The float64 sums depend on the batch size
    by rounding.

    Args:
        layers: MoE layers, L.
        experts: E.
        steps: sampling steps.
        tokens: tokens of an image, S.
        groups: classes or groups of prompts.
        device: where to count.

    Attributes:
        images_by_group: (groups,) int64, images counted.
        rows_by_group: (L, groups, E) int64, rows over all steps.
        rows_by_position: (L, S, E) int64, rows over all steps.
        rows_by_step: (steps, L, E) int64.
        tokens_by_count: (steps, L, E + 1) int64, tokens that 0, 1, ..., E experts took.
        experts_by_position: (steps, L, S) int64, experts of the token at each position.
        pairs: (L, E, E) int64, tokens that both experts took, over all steps.
        weight_by_group: (L, groups, E) float64, routing weight over all steps.
        weight_by_step: (steps, L, E) float64, routing weight.
        entropy_by_step: (steps, L) float64, ``token_entropy`` over all tokens.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        steps: int,
        tokens: int,
        groups: int,
        device: torch.device | str = "cpu",
    ) -> None:
        def count(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        def total(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokens = tokens
        self.images_by_group = count(groups)
        self.rows_by_group = count(layers, groups, experts)
        self.rows_by_position = count(layers, tokens, experts)
        self.rows_by_step = count(steps, layers, experts)
        self.tokens_by_count = count(steps, layers, experts + 1)
        self.experts_by_position = count(steps, layers, tokens)
        self.pairs = count(layers, experts, experts)
        self.weight_by_group = total(layers, groups, experts)
        self.weight_by_step = total(steps, layers, experts)
        self.entropy_by_step = total(steps, layers)

    @property
    def num_images(self) -> int:
        """Images counted; waits for the device."""
        return int(self.images_by_group.sum())

    def add_images(self, groups: Tensor) -> None:
        """Note the (n,) groups of images whose steps are all counted."""
        self.images_by_group.index_add_(0, groups, torch.ones_like(groups))

    def add(self, step: int, layer: int, table: ByToken, entropy: Tensor, groups: Tensor) -> None:
        """Count one layer of one step.

        Args:
            step: sampling step, from 0.
            layer: MoE layer, from 0.
            table: of n images, from ``by_token``.
            entropy: (n, S), from ``token_entropy``.
            groups: (n,) int64, the group of each image.
        """
        chosen, weights = table.chosen, table.weights.double()
        held = chosen.sum(dim=2)  # (n, S), experts of each token
        by_image = chosen.sum(dim=1)  # (n, E)
        self.rows_by_group[layer].index_add_(0, groups, by_image)
        self.rows_by_position[layer] += chosen.sum(dim=0)
        self.rows_by_step[step, layer] += by_image.sum(dim=0)
        self.tokens_by_count[step, layer].index_add_(
            0, held.flatten(), torch.ones_like(held.flatten())
        )
        self.experts_by_position[step, layer] += held.sum(dim=0)
        flat = chosen.flatten(0, 1).double()  # exact up to 2^53 tokens
        self.pairs[layer] += (flat.T @ flat).long()
        weight_by_image = weights.sum(dim=1)
        self.weight_by_group[layer].index_add_(0, groups, weight_by_image)
        self.weight_by_step[step, layer] += weight_by_image.sum(dim=0)
        self.entropy_by_step[step, layer] += entropy.double().sum()

    def merge(self, other: "RoutingCounts") -> None:
        """Add the counts of other images."""
        for name, mine in self._sums().items():
            mine += getattr(other, name)

    def to_cpu(self) -> "RoutingCounts":
        """Move every sum to the CPU, in place, and return self."""
        for name, mine in self._sums().items():
            setattr(self, name, mine.cpu())
        return self

    def _sums(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def check_plans(plans: Sequence[mk.RoutingPlan]) -> int:
    """The number of experts of all plans.

    Raises:
        ValueError: without plans (a dense model), or when layers differ in their experts.
    """
    if not plans:
        raise ValueError(
            "this model is dense: it has no MoE layers, so there is no routing to analyze. "
            "Give a run of an EC-DiT or DiT-MoE model."
        )
    experts = {plan.num_experts for plan in plans}
    if len(experts) != 1:
        raise ValueError(
            f"the MoE layers have {sorted(experts)} experts; expected the same number in each."
        )
    return experts.pop()
