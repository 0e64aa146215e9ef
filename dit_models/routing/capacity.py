"""Capacity schedules of expert choice: by layer, by stage of training and by noise level."""

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dit_models.routing.base import fail, fail_option, is_number

if TYPE_CHECKING:
    from dit_models.model_config import ModelConfig


@dataclass(frozen=True)
class CapacityOptions:
    """Multipliers of ``capacity_factor``; the product of all of them is the factor that is used.

    f = capacity_factor · by_layer[l] · by_stage(progress) · by_noise(noise level), and
    C = max(1, round(S · f / E)).
    """

    capacity_by_layer: list[float] = field(
        default_factory=list,
        metadata={
            "help": (
                "one multiplier of capacity_factor for each MoE layer, first layer first "
                "(Nucleus-Image, arXiv 2604.12163: 4, 4, then 2 is capacity_factor=2 with 2, "
                "2, 1, ...); empty: 1"
            )
        },
    )
    capacity_by_stage: list[list[float]] = field(
        default_factory=list,
        metadata={
            "help": (
                "[[from, multiplier], ...]: the multiplier from that share of the steps on (0 "
                "to 1, rising, the first at 0); sampling uses the stage that training had "
                "reached; empty: 1"
            )
        },
    )
    capacity_by_noise: list[list[float]] = field(
        default_factory=list,
        metadata={
            "help": (
                "[[noise level, multiplier], ...]: piecewise linear in the noise level (0 to "
                "1, rising; 1 is pure noise), constant beyond the ends; each image has its "
                "own capacity; empty: 1"
            )
        },
    )

    def __post_init__(self) -> None:
        for name in ("capacity_by_layer", "capacity_by_stage", "capacity_by_noise"):
            if not isinstance(getattr(self, name), (list, tuple)):
                fail_option(name, getattr(self, name), "expected a list")
        if not all(is_number(value) and value > 0 for value in self.capacity_by_layer):
            fail_option("capacity_by_layer", self.capacity_by_layer, "expected numbers above 0")
        for name in ("capacity_by_stage", "capacity_by_noise"):
            points = getattr(self, name)
            valid = all(_is_point(point) for point in points)
            if not valid or any(a[0] >= b[0] for a, b in itertools.pairwise(points)):
                expected = "expected [[position from 0 to 1, multiplier above 0], ...], rising"
                fail_option(name, points, expected)
        if self.capacity_by_stage and self.capacity_by_stage[0][0] != 0:
            fail_option(
                "capacity_by_stage", self.capacity_by_stage, "expected the first stage at 0"
            )

    def check(self, config: "ModelConfig") -> None:
        """Raise ``ValueError`` unless every factor that can occur fits the model."""
        layers = len(config.moe_blocks)
        if self.capacity_by_layer and len(self.capacity_by_layer) != layers:
            reason = f"expected {layers} numbers, one for each MoE layer"
            fail_option("capacity_by_layer", self.capacity_by_layer, reason)
        largest = config.capacity_factor * max(self.capacity_by_layer, default=1.0)
        for points in (self.capacity_by_stage, self.capacity_by_noise):
            largest *= max((multiplier for _, multiplier in points), default=1.0)
        # Rounded: 1.6 · 1.25 · ... may be a hair above the number it stands for.
        if round(largest, 9) > config.num_experts:
            reason = (
                f"with its schedules it reaches {largest:g}: expected at most "
                f"num_experts={config.num_experts}"
            )
            fail("capacity_factor", config.capacity_factor, reason)
        if self.capacity_by_noise and config.group != "image":
            fail_option(
                "capacity_by_noise",
                self.capacity_by_noise,
                f'images have noise levels of their own: group={config.group!r} must be "image"',
            )

    @property
    def scheduled(self) -> bool:
        """Whether the factor depends on the stage or the noise level."""
        return bool(self.capacity_by_stage or self.capacity_by_noise)

    def layer_factor(self, config: "ModelConfig", moe_layer: int) -> float:
        """capacity_factor times the multiplier of the layer."""
        own = self.capacity_by_layer[moe_layer] if self.capacity_by_layer else 1.0
        return config.capacity_factor * own

    def stage_of(self, progress: float) -> int:
        """Index of the stage at this share of the steps."""
        return max(sum(start <= progress for start, _ in self.capacity_by_stage) - 1, 0)

    @property
    def last_stage(self) -> int:
        """Index of the last stage."""
        return max(len(self.capacity_by_stage) - 1, 0)

    def stage_multiplier(self, stage: int) -> float:
        """Of the stage; 1 without stages."""
        return self.capacity_by_stage[stage][1] if self.capacity_by_stage else 1.0

    def noise_multiplier(self, level: float) -> float:
        """Of the noise level; 1 without a schedule."""
        points = self.capacity_by_noise
        if not points:
            return 1.0
        after = sum(position <= level for position, _ in points)
        if after in (0, len(points)):
            return points[min(after, len(points) - 1)][1]
        (left, low), (right, high) = points[after - 1], points[after]
        return low + (high - low) * (level - left) / (right - left)


def _is_point(point: object) -> bool:
    """Whether this is a position and its multiplier."""
    if not isinstance(point, (list, tuple)) or len(point) != 2:
        return False
    position, multiplier = point
    return is_number(position) and 0 <= position <= 1 and is_number(multiplier) and multiplier > 0
