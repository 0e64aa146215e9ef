"""Expert Race (arXiv 2503.16057): the best of all token-expert pairs of the batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

import moe_kernels as mk
from dit_models.initialization import reset_layers
from dit_models.routing.base import (
    LayerRouting,
    Router,
    RouterContext,
    Routing,
    check_capacity_factor,
    fail_option,
)
from dit_models.routing.threshold import RunningThreshold, check_decay, check_inference

if TYPE_CHECKING:
    from dit_models.model_config import ModelConfig

Inference = Literal["threshold", "batch_topk"]


@dataclass(frozen=True)
class ExpertRaceOptions:
    """What Expert Race adds to the choice of the best pairs."""

    inference: Inference = field(
        default="threshold",
        metadata={
            "help": (
                "threshold: a pair wins when its score reaches the learnt threshold "
                "(published), so an image does not depend on its batch; batch_topk: the "
                "batch's best pairs, as in training"
            )
        },
    )
    threshold_decay: float = field(
        default=0.95,
        metadata={
            "help": ("decay of the threshold's running mean (the paper has one; the value is ours)")
        },
    )
    layer_head: bool = field(
        default=True,
        metadata={
            "help": (
                "per-layer regularisation: each MoE layer predicts the training target by a "
                "linear head on the tokens that the router reads (where it reads is our "
                "reading of the paper)"
            )
        },
    )

    def __post_init__(self) -> None:
        check_inference(self.inference, Inference)
        check_decay(self.threshold_decay)
        if not isinstance(self.layer_head, bool):
            fail_option("layer_head", self.layer_head, "expected true or false")


class ExpertRaceRouter(Router):
    """The best B·S·k of all B·S·E token-expert pairs in training, k = ``capacity_factor``.

    The scores are the affinities (raw logits with ``affinity="identity"``, as published) and also
    the routing weights. In inference a pair wins whose score is at least the threshold: the running
    mean of the smallest winning score of the training steps. The number of rows then follows from
    the tokens, so every MoE layer waits once for the device to count them.
    """

    pools_batch = True

    def __init__(self, config: "ModelConfig", options: ExpertRaceOptions, **factory: Any) -> None:
        super().__init__(config.hidden_size, config.num_experts, **factory)
        self.inference = options.inference
        self.experts_per_token = config.capacity_factor
        self.routing = {
            "affinity": config.affinity,
            "normalize": config.normalize,
            "scale": config.routing_scale,
        }
        self.threshold = RunningThreshold((), options.threshold_decay, factory.get("device"))
        self.layer_head: nn.Linear | None = None
        if options.layer_head:
            width = config.patch_size**2 * config.in_channels
            self.layer_head = nn.Linear(config.hidden_size, width, **factory)
            reset_layers(self.layer_head)

    def forward(self, x: Tensor, context: RouterContext) -> LayerRouting:
        """Route (B, S, D) tokens."""
        logits = self.logits(x)
        options: dict[str, Any] = {**self.routing, "num_groups": max(x.shape[0], 1)}
        if not self.training and self.inference == "threshold":
            won = self._scores(logits) >= self.threshold.value
            return LayerRouting(mk.plan_from_selection(won, logits, **options))
        if (pool := self.training_pool) is not None:
            num_tokens = pool.num_tokens(logits)
            num_rows = max(1, round(num_tokens * self.experts_per_token))
            plan, smallest = pool.pair_choice(
                logits, num_rows, num_tokens_global=num_tokens, **options
            )
        else:
            num_rows = max(1, round(logits.shape[0] * self.experts_per_token))
            plan = mk.pair_choice(logits, num_rows, **options)
            if not self.training:
                return LayerRouting(plan)
            smallest = self._scores(logits).detach().flatten().topk(num_rows).values[-1]
        prediction = None if self.layer_head is None else self.layer_head(x)
        return LayerRouting(plan, observed={"threshold": smallest}, prediction=prediction)

    def _scores(self, logits: Tensor) -> Tensor:
        affinity = self.routing["affinity"]
        if affinity == "softmax":
            return logits.softmax(dim=1)
        return logits.sigmoid() if affinity == "sigmoid" else logits

    def update(self, observed: Mapping[str, Tensor]) -> None:
        """Average the step's threshold in."""
        self.threshold.update(observed["threshold"])

    def reset_parameters(self) -> None:
        """Fresh weights; the threshold as before the first step."""
        super().reset_parameters()
        if "threshold" in self._modules:
            self.threshold.reset()
            if self.layer_head is not None:
                reset_layers(self.layer_head)


class ExpertRace(Routing):
    """Tokens and experts race together: neither side has a fixed number of places.

    The paper adds the router similarity loss (``router_loss.similarity``) and the layer heads.
    """

    name = "expert_race"
    family = "ec_dit"
    summary = "the best of all token-expert pairs of the batch (Expert Race, arXiv 2503.16057)"
    fields = ("capacity_factor",)
    options = ExpertRaceOptions
    # The coefficient is ours: the paper's was not found.
    losses = MappingProxyType({"layer_head": 0.01})

    def check(self, config: "ModelConfig", options: Any) -> None:
        """The number of pairs is above 0 and at most all."""
        check_capacity_factor(config)

    def own_losses(self, options: Any) -> Mapping[str, float]:
        """None without layer heads."""
        return self.losses if options.layer_head else {}

    def pools_images(self, config: "ModelConfig") -> bool:
        """Always, in training."""
        return True

    def router(
        self, config: "ModelConfig", options: Any, moe_layer: int, factory: dict[str, Any]
    ) -> mk.LinearRouter:
        """An ``ExpertRaceRouter``."""
        return ExpertRaceRouter(config, options, **factory)
