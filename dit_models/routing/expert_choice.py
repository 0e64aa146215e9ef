"""Expert choice: each expert takes its C best tokens (EC-DiT, arXiv 2410.02098)."""

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import moe_kernels as mk
from dit_models.routing.base import (
    LayerRouting,
    Router,
    RouterContext,
    Routing,
    check_capacity_factor,
)
from dit_models.routing.capacity import CapacityOptions

if TYPE_CHECKING:
    from dit_models.model_config import ModelConfig


class ScheduledRouter(Router):
    """Expert choice whose capacity follows the schedules of ``CapacityOptions``.

    Args:
        config: of the model.
        options: the schedules.
        moe_layer: index of this MoE layer.
        in_features: width of what the logits are made of, D by default.
    """

    stage: Tensor

    def __init__(
        self,
        config: "ModelConfig",
        options: CapacityOptions,
        moe_layer: int,
        *,
        in_features: int | None = None,
        **factory: Any,
    ) -> None:
        super().__init__(config.hidden_size, config.num_experts, **factory, in_features=in_features)
        self.options = options
        self.capacity_factor = options.layer_factor(config, moe_layer)
        self.group = config.group
        self.pools_batch = config.group == "batch"
        self.rounding = {"rounding": config.rounding, "multiple_of": config.capacity_multiple_of}
        self.routing = {
            "affinity": config.affinity,
            "normalize": config.normalize,
            "scale": config.routing_scale,
        }
        # A host integer beside its buffer: the capacity is a shape, and is never read back.
        self._stage = options.last_stage
        if options.capacity_by_stage:
            stage = torch.tensor(self._stage, device=factory.get("device"))
            self.register_buffer("stage", stage)

    def forward(self, x: Tensor, context: RouterContext) -> LayerRouting:
        """Route (B, S, D) tokens."""
        return LayerRouting(self.choose(self.logits(x), x, context))

    def choose(self, router_logits: Tensor, x: Tensor, context: RouterContext) -> mk.RoutingPlan:
        """The plan of (B·S, E) logits for (B, S, D) tokens."""
        batch_size, seq_len = x.shape[:2]
        options: dict[str, Any] = {**self.routing}
        if not self.options.capacity_by_noise:
            num_groups = mk.num_pools(self.group, batch_size, seq_len)
            factor = self.factor()
            rounding: dict[str, Any] = self.rounding
            if (pool := self.training_pool) is not None:
                return pool.expert_choice(router_logits, factor, **options, **rounding)
            return mk.expert_choice(
                router_logits, factor, num_groups=num_groups, **options, **rounding
            )
        assert context.noise_levels is not None
        capacities = [self.capacity(seq_len, level) for level in context.noise_levels]
        if len(set(capacities)) == 1:  # as in sampling, where all images share a noise level
            return mk.expert_choice(
                router_logits, capacity=capacities[0], num_groups=batch_size, **options
            )
        return mk.expert_choice_per_group(router_logits, capacities, **options)

    def factor(self, noise_level: float | None = None) -> float:
        """The capacity factor now, at a noise level."""
        by_noise = 1.0 if noise_level is None else self.options.noise_multiplier(noise_level)
        return self.capacity_factor * self.options.stage_multiplier(self._stage) * by_noise

    def capacity(self, seq_len: int, noise_level: float | None = None) -> int:
        """C for an image of ``seq_len`` tokens now, at a noise level."""
        rounding: dict[str, Any] = self.rounding
        return mk.expert_capacity(seq_len, self.num_experts, self.factor(noise_level), **rounding)

    def set_progress(self, progress: float) -> None:
        """Go to the stage of this share of the training."""
        stage = self.options.stage_of(progress)
        if stage != self._stage:
            self._stage = stage
            self.stage.fill_(stage)

    def reset_parameters(self) -> None:
        """Fresh weights, and the last stage, which is that of a trained model."""
        super().reset_parameters()
        if "stage" in self._buffers:
            self._stage = self.options.last_stage
            self.stage.fill_(self._stage)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}stage" in state_dict and not self.stage.is_meta:
            self._stage = int(self.stage)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.num_experts}, capacity_factor={self.capacity_factor}"


class ExpertChoiceKind(Routing):
    """What the routings share in which experts choose, with capacity schedules."""

    family = "ec_dit"
    fields = ("capacity_factor", "group", "rounding", "capacity_multiple_of")
    options = CapacityOptions

    def check(self, config: "ModelConfig", options: Any) -> None:
        """The capacity factor fits the experts at every layer, stage and noise level."""
        check_capacity_factor(config)
        options.check(config)

    def reads_noise_levels(self, options: Any) -> bool:
        """With a schedule by noise level."""
        return bool(options.capacity_by_noise)

    def pools_images(self, config: "ModelConfig") -> bool:
        """Unless each image is a pool of its own."""
        return config.group != "image"

    def experts_per_token(self, config: "ModelConfig", options: Any, moe_layer: int) -> Fraction:
        """The factor of the layer in the last stage; at the noise levels' mean multiplier."""
        return Fraction(config.capacity_factor) * _multiplier(options, moe_layer)

    def rows_per_image(
        self, config: "ModelConfig", options: Any, moe_layer: int, seq_len: int
    ) -> int:
        """E · C, with the capacity rounded as it is in the model."""
        factor = config.capacity_factor * float(_multiplier(options, moe_layer))
        capacity = mk.expert_capacity(
            seq_len,
            config.num_experts,
            factor,
            rounding=config.rounding,
            multiple_of=config.capacity_multiple_of,
        )
        return config.num_experts * capacity


def _multiplier(options: CapacityOptions, moe_layer: int) -> Fraction:
    """Of the layer in the last stage, at the mean over the noise levels 0.005, 0.015, ..."""
    layer = options.capacity_by_layer[moe_layer] if options.capacity_by_layer else 1.0
    levels = [(i + 0.5) / 100 for i in range(100)] if options.capacity_by_noise else [0.0]
    noise = sum(options.noise_multiplier(level) for level in levels) / len(levels)
    return Fraction(layer) * Fraction(options.stage_multiplier(options.last_stage) * noise)


class ExpertChoice(ExpertChoiceKind):
    """Softmax over the experts, each takes its best tokens of an image (or pool)."""

    name = "expert_choice"
    summary = "each expert takes its C = S f_c / E best tokens (EC-DiT, arXiv 2410.02098)"

    def router(
        self, config: "ModelConfig", options: Any, moe_layer: int, factory: dict[str, Any]
    ) -> mk.LinearRouter:
        """The plain router of ``moe_kernels``, or one with schedules."""
        if options.scheduled:
            return ScheduledRouter(config, options, moe_layer, **factory)
        return mk.ExpertChoiceRouter(
            config.hidden_size,
            config.num_experts,
            capacity_factor=options.layer_factor(config, moe_layer),
            group=config.group,
            affinity=config.affinity,
            normalize=config.normalize,
            scale=config.routing_scale,
            rounding=config.rounding,
            multiple_of=config.capacity_multiple_of,
            **factory,
        )
