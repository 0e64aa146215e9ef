"""What a routing idea is made of: its options, its router, and what a router reads and returns."""

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

import moe_kernels as mk

if TYPE_CHECKING:
    from dit_models.model_config import ModelConfig


class RouterContext(NamedTuple):
    """What a router may read beside the tokens that the experts get.

    Attributes:
        unmodulated: (B, S, D) the normalised tokens before the timestep's shift and scale.
        timestep_embedding: (B, D) of the timestep alone.
        conditioning: (B, D) the sum of the embedded timestep, class and text.
        noise_levels: of each image, 1 is pure noise, on the host; ``None`` unless the routing
            asks for them (``Routing.reads_noise_levels``).
    """

    unmodulated: Tensor
    timestep_embedding: Tensor
    conditioning: Tensor
    noise_levels: tuple[float, ...] | None = None


_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class LayerRouting(NamedTuple):
    """What one MoE layer decided.

    Attributes:
        plan: the routing.
        losses: the router's own losses, unweighted scalars by name.
        observed: statistics of this batch, without gradient, for ``Router.update``; each must
            average over micro-batches.
        prediction: (B, S, C · p²) the layer's own prediction of the training target, in patches
            as ``patchify`` cuts them; ``None`` without a layer head.
    """

    plan: mk.RoutingPlan
    losses: Mapping[str, Tensor] = _NOTHING
    observed: Mapping[str, Tensor] = _NOTHING
    prediction: Tensor | None = None


class Router(mk.LinearRouter):
    """A router with more than tokens to read or more than a plan to return."""

    routing: dict[str, Any] = {}  # noqa: RUF012  # what ``mk.warmup`` tells kinds of layers by

    def forward(self, x: Tensor, context: RouterContext) -> LayerRouting:
        """Route (B, S, D) tokens.

        Nothing here may change the module: under gradient checkpointing it runs twice. What is to
        be learnt without a gradient goes into ``observed``.
        """
        raise NotImplementedError

    def update(self, observed: Mapping[str, Tensor]) -> None:
        """Take in what the training step observed; called once after each optimizer step."""

    def set_progress(self, progress: float) -> None:
        """Take in the share of training that is done, 0 to 1; called before each step."""


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """A routing without options of its own."""


class Routing:
    """One routing idea, as the registry holds it.

    Attributes:
        name: value of ``ModelConfig.routing``.
        family: "ec_dit" where experts (or pairs of token and expert) are chosen, "dit_moe" where
            every token chooses.
        summary: one line with the source.
        fields: fields of ``ModelConfig`` that it reads, beside those that every MoE layer has.
        options: dataclass of its own options (``ModelConfig.routing_options``), with
            the help of each field in its metadata; its ``__post_init__`` raises ``ValueError``.
        losses: its own losses and their default coefficients (``router_loss.own``).
    """

    name: ClassVar[str]
    family: ClassVar[str]
    summary: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[type] = NoOptions
    losses: ClassVar[Mapping[str, float]] = MappingProxyType({})

    def check(self, config: "ModelConfig", options: Any) -> None:
        """Raise ``ValueError`` when fields and options do not fit each other."""

    def router(
        self, config: "ModelConfig", options: Any, moe_layer: int, factory: dict[str, Any]
    ) -> mk.LinearRouter:
        """The router of MoE layer ``moe_layer`` (from 0).

        A ``Router``, or one of ``moe_kernels``' own, which reads the tokens and returns a plan.
        """
        raise NotImplementedError

    def own_losses(self, options: Any) -> Mapping[str, float]:
        """Those of ``losses`` that a model with these options has."""
        return self.losses

    def pools_images(self, config: "ModelConfig") -> bool:
        """Whether images of a batch compete: micro-batches then do not equal the large batch."""
        return False

    def reads_noise_levels(self, options: Any) -> bool:
        """Whether its routers read ``RouterContext.noise_levels``."""
        return False

    def experts_per_token(self, config: "ModelConfig", options: Any, moe_layer: int) -> Fraction:
        """Experts that process a token of this layer, on average."""
        return Fraction(config.capacity_factor)

    def rows_per_image(
        self, config: "ModelConfig", options: Any, moe_layer: int, seq_len: int
    ) -> int:
        """Expert rows of an image of ``seq_len`` tokens, for the count of multiplications."""
        return round(self.experts_per_token(config, options, moe_layer) * seq_len)

    def router_macs(self, config: "ModelConfig", seq_len: int) -> int:
        """Multiply-accumulates of the router for an image, in inference."""
        return seq_len * config.hidden_size * config.num_experts


def fail(name: str, value: object, reason: str) -> None:
    """Raise the ``ValueError`` of a field of the model's configuration."""
    raise ValueError(f"ModelConfig.{name}={value!r}: {reason}")


def fail_option(name: str, value: object, reason: str) -> None:
    """Raise the ``ValueError`` of an option of the routing."""
    fail(f"routing_options.{name}", value, reason)


def is_number(value: object) -> bool:
    """Whether a value is a finite number and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_capacity_factor(config: "ModelConfig") -> None:
    """Raise ``ValueError`` unless the factor is above 0 and at most the number of experts."""
    if not 0 < config.capacity_factor <= config.num_experts:
        reason = f"expected above 0 and at most num_experts={config.num_experts}"
        fail("capacity_factor", config.capacity_factor, reason)


def make_options(routing: Routing, values: Mapping[str, Any]) -> Any:
    """The options dataclass of a routing, from plain values.

    Raises:
        ValueError: an unknown option, or a value that the routing refuses.
    """
    known = [field.name for field in dataclasses.fields(routing.options)]
    if unknown := sorted(set(values) - set(known)):
        listed = f"known: {', '.join(known)}" if known else "it has none"
        fail(
            "routing_options", dict(values), f"routing {routing.name!r} has no {unknown}; {listed}"
        )
    return routing.options(**values)
