"""DiffMoE (arXiv 2503.14487): experts choose from the whole batch, a predictor learns how much."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_kernels as mk
from dit_models.routing.base import (
    LayerRouting,
    Router,
    RouterContext,
    Routing,
    check_capacity_factor,
)
from dit_models.routing.threshold import RunningThreshold, check_decay, check_inference

if TYPE_CHECKING:
    from dit_models.model_config import ModelConfig
    from moe_kernels import distributed

Inference = Literal["batch_topk", "threshold"]


@dataclass(frozen=True)
class DiffMoEOptions:
    """What DiffMoE adds to expert choice over the batch."""

    inference: Inference = field(
        default="threshold",
        metadata={
            "help": (
                "threshold: an expert takes every token whose predicted score is above its "
                "threshold, so an image does not depend on its batch (ours); batch_topk "
                "(published): it counts these tokens and takes as many of the batch's best by "
                "affinity, so an image does depend on it"
            )
        },
    )
    threshold_decay: float = field(
        default=0.95,
        metadata={
            "help": (
                "decay of the running mean of each expert's threshold (the authors' code: 0.95)"
            )
        },
    )

    def __post_init__(self) -> None:
        check_inference(self.inference, Inference)
        check_decay(self.threshold_decay)


class DiffMoERouter(Router):
    """Expert choice over all B·S tokens in training; by predicted scores in inference.

    Training: C = max(1, round(B S f_c / E)), B counting all ranks that share a pool.
    A predictor, Linear(D, D)-SiLU-Linear(D, E) on the detached token, learns by binary
    cross-entropy which experts choose the token; the threshold of an expert is the running mean of
    its C-th largest sigmoid score. Scores are in fp32.

    In inference the number of rows follows from the tokens, so every MoE layer waits once for the
    device to count them (and ``torch.compile`` breaks its graph there).
    """

    pools_batch = True

    def __init__(self, config: "ModelConfig", options: DiffMoEOptions, **factory: Any) -> None:
        super().__init__(config.hidden_size, config.num_experts, **factory)
        self.inference = options.inference
        self.capacity_factor = config.capacity_factor
        self.rounding = {"rounding": config.rounding, "multiple_of": config.capacity_multiple_of}
        self.routing = {
            "affinity": config.affinity,
            "normalize": config.normalize,
            "scale": config.routing_scale,
        }
        self.capacity_predictor = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size, **factory),
            nn.SiLU(),
            nn.Linear(config.hidden_size, config.num_experts, **factory),
        )
        self.threshold = RunningThreshold(
            (config.num_experts,), options.threshold_decay, factory.get("device")
        )

    def forward(self, x: Tensor, context: RouterContext) -> LayerRouting:
        """Route (B, S, D) tokens."""
        logits, scores = self.logits(x), self.scores(x)
        if self.training:
            return self._choose_by_capacity(logits, scores)
        return LayerRouting(self._choose_by_prediction(logits, scores, x.shape[0]))

    def scores(self, x: Tensor) -> Tensor:
        """(B·S, E) predictor's logits: whether an expert would choose the token."""
        tokens = x.detach().flatten(0, -2)
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            for layer in self.capacity_predictor:
                if isinstance(layer, nn.Linear):
                    weight, bias = layer.weight.to(tokens.dtype), layer.bias.to(tokens.dtype)
                    tokens = F.linear(tokens, weight, bias)
                else:
                    tokens = layer(tokens)
        return tokens

    def _choose_by_capacity(self, logits: Tensor, scores: Tensor) -> LayerRouting:
        if self.training_pool is not None:
            return self._choose_from_all_ranks(self.training_pool, logits, scores)
        options: dict[str, Any] = {**self.routing, **self.rounding}
        plan = mk.expert_choice(logits, self.capacity_factor, num_groups=1, **options)
        assert plan.capacity is not None
        taken = plan.token_indices.long().view(plan.num_experts, plan.capacity)
        chosen = torch.zeros_like(scores.T).scatter(1, taken, 1.0).T  # (T, E)
        loss = F.binary_cross_entropy_with_logits(scores, chosen)
        smallest = scores.detach().topk(plan.capacity, dim=0).values[-1]  # (E,)
        return LayerRouting(plan, {"capacity_predictor": loss}, {"threshold": smallest.sigmoid()})

    def _choose_from_all_ranks(
        self, pool: "distributed.SharedPool", logits: Tensor, scores: Tensor
    ) -> LayerRouting:
        """The same from the tokens of all ranks; the mean of their losses is that of the pool."""
        num_tokens = pool.num_tokens(logits)
        rounding: dict[str, Any] = self.rounding
        capacity = mk.expert_capacity(
            num_tokens, self.num_experts, self.capacity_factor, **rounding
        )
        plan = pool.expert_choice(
            logits, capacity=capacity, num_tokens_global=num_tokens, **self.routing
        )
        chosen = torch.zeros_like(scores).index_put(
            (plan.token_indices, plan.expert_of_row), scores.new_ones(())
        )
        loss = F.binary_cross_entropy_with_logits(scores, chosen, reduction="sum")
        loss = loss * (pool.num_ranks / max(num_tokens * self.num_experts, 1))
        smallest = pool.kth_largest(scores, max(capacity, 1))  # (E,)
        return LayerRouting(plan, {"capacity_predictor": loss}, {"threshold": smallest.sigmoid()})

    def _choose_by_prediction(
        self, logits: Tensor, scores: Tensor, batch_size: int
    ) -> mk.RoutingPlan:
        chosen = scores.sigmoid() > self.threshold.value
        if self.inference == "batch_topk":
            order = torch.sort(logits_key(logits, self.routing["affinity"]), dim=0,
                               descending=True, stable=True).indices  # fmt: skip
            ranks = torch.arange(len(order), device=order.device).unsqueeze(1)
            within = ranks < chosen.sum(dim=0)
            chosen = torch.zeros_like(chosen).scatter(0, order, within)
        options: dict[str, Any] = self.routing
        return mk.plan_from_selection(chosen, logits, num_groups=max(batch_size, 1), **options)

    def update(self, observed: Mapping[str, Tensor]) -> None:
        """Average the step's thresholds in."""
        self.threshold.update(observed["threshold"])

    def reset_parameters(self) -> None:
        """Fresh weights; thresholds as before the first step."""
        super().reset_parameters()
        if "capacity_predictor" in self._modules:
            for layer in self.capacity_predictor:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
            self.threshold.reset()


def logits_key(logits: Tensor, affinity: str) -> Tensor:
    """What experts rank tokens by."""
    if affinity == "softmax":
        return logits.softmax(dim=1)
    return logits  # a sigmoid keeps the order


class DiffMoE(Routing):
    """Expert choice over the batch pool with a capacity predictor."""

    name = "diffmoe"
    family = "ec_dit"
    summary = "experts choose from the whole batch; learnt thresholds (DiffMoE, arXiv 2503.14487)"
    fields = ("capacity_factor", "rounding", "capacity_multiple_of")
    options = DiffMoEOptions
    # The predictor alone has a gradient from it, so that its size hardly matters.
    losses = MappingProxyType({"capacity_predictor": 1.0})

    def check(self, config: "ModelConfig", options: Any) -> None:
        """The capacity factor fits the experts."""
        check_capacity_factor(config)

    def pools_images(self, config: "ModelConfig") -> bool:
        """Always, in training."""
        return True

    def router(
        self, config: "ModelConfig", options: Any, moe_layer: int, factory: dict[str, Any]
    ) -> mk.LinearRouter:
        """A ``DiffMoERouter``."""
        return DiffMoERouter(config, options, **factory)

    def router_macs(self, config: "ModelConfig", seq_len: int) -> int:
        """Router and predictor."""
        size, experts = config.hidden_size, config.num_experts
        return seq_len * (size * experts + size * size + size * experts)
