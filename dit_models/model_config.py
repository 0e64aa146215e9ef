"""The shape of a model as data: one frozen dataclass for all three families."""

import dataclasses
from typing import Any, Literal, get_args

from dit_models.routing import DEFAULTS, ROUTINGS, Routing, make_options

Family = Literal["dit", "dit_moe", "ec_dit"]
ExpertActivation = Literal["gelu_tanh", "gelu", "swiglu"]
Normalize = Literal["none", "per_token"]
Affinity = Literal["softmax", "sigmoid", "identity"]
Rounding = Literal["floor", "ceil"]
Positions = Literal["sincos", "rope", "both"]
QKNormKind = Literal["layer_norm", "rms_norm"]

_POSITIVE_INTS = ("depth", "hidden_size", "num_heads", "num_kv_heads", "patch_size", "in_channels",
                  "out_channels", "image_size", "moe_every", "capacity_multiple_of")  # fmt: skip
_NON_NEGATIVE_INTS = ("num_classes", "text_dim", "num_experts", "top_k", "mask_decoder_depth",
                      "time_frequency_shift")  # fmt: skip
_POSITIVE_FLOATS = ("max_timestep", "mlp_ratio", "time_scale", "routing_scale", "rope_theta")
_NON_NEGATIVE_FLOATS = ("capacity_factor", "expert_ratio", "shared_ratio")
_BOOLS = ("mlp_bias", "qkv_bias", "qk_norm", "expert_bias")
_CHOICES = {
    "family": get_args(Family),
    "expert_activation": get_args(ExpertActivation),
    "affinity": get_args(Affinity),
    "normalize": get_args(Normalize),
    "rounding": get_args(Rounding),
    "positions": get_args(Positions),
    "qk_norm_kind": get_args(QKNormKind),
    "mlp_activation": get_args(ExpertActivation),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a diffusion transformer; a wrong or contradictory value raises ``ValueError``.

    A zero means "none" (``num_classes``, ``text_dim``, ``num_experts``, ``top_k``,
    ``capacity_factor``, ``shared_ratio``). A field that the family would ignore must keep its
    default, so no setting is silently without effect.

    Attributes:
        family: "dit" (dense), "dit_moe" (token choice) or "ec_dit" (expert choice).
        depth: number of transformer blocks.
        hidden_size: width D, a multiple of 4 (2-D sin-cos positions) and of ``num_heads``.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of ``num_heads``; ``None`` = ``num_heads``.
        patch_size: side of a square patch, in latent pixels.
        in_channels: channels of the latents.
        out_channels: channels of the prediction (twice ``in_channels`` with a learned variance).
        image_size: side of the square latents that the counts and the stored positions are for.
        num_classes: classes, the null class excluded: its index is ``num_classes``.
        text_dim: width of the text features that the cross-attention reads.
        mlp_ratio: F / D of the dense FFN, and of one expert where ``expert_ratio`` is 0.
        mlp_bias: biases in the dense FFN.
        mlp_activation: of the dense FFN: "gelu_tanh" (DiT), "gelu", or "swiglu" (arXiv 2002.05202,
            eq. 6: SiLU(x W_gate) * (x W_up)). The width F stays ``mlp_ratio`` * D, so "swiglu" has
            3 D F weights instead of 2 D F; an ``mlp_ratio`` of 8/3 keeps the number.
        qkv_bias: biases in the query, key and value projections.
        qk_norm: a norm on queries and keys of the self-attention, per head (arXiv 2302.05442).
        qk_norm_kind: "layer_norm" (DiT-MoE's XL and G), or "rms_norm" without biases.
        positions: "sincos" (DiT: a fixed table added to the patches), "rope" (queries and keys
            turned by row and column, see ``rope.py``) or "both".
        rope_theta: base of the rotations' frequencies.
        mask_decoder_depth: last blocks that see all tokens in masked training, with a learned mask
            token in the place of each hidden one (MaskDiT, arXiv 2306.09305); 0 = the hidden tokens
            are left out to the end. Without masking it changes nothing.
        time_scale: multiplies the timesteps before their sinusoidal embedding.
        time_frequency_shift: s in the frequencies exp(-ln(10000) i / (128 - s)) of that embedding:
            0 in DiT and DiT-MoE, 1 in diffusers' ``DiTTransformer2DModel``.
        num_experts: experts E of a MoE layer.
        routing: how tokens find experts, a name of ``dit_models.routing.ROUTINGS``; ``None`` = that
            of the family ("token_choice" or "expert_choice"). See docs/routing.md.
        routing_options: options of that routing by name (``python -m dit_models.routing``).
        max_timestep: the timestep that is pure noise (1 for rectified flow, the number of steps
            for DDPM), for a routing that reads noise levels.
        top_k: experts a token picks (token choice).
        capacity_factor: average number of experts a token gets (expert choice).
        group: tokens that compete for an expert: "image", "batch" or a number of tokens
            (expert choice).
        moe_every: 1 = every block is MoE, 2 = every second, the even ones counting from 1.
        expert_activation: activation of experts and shared expert; "swiglu" has a gate half.
        expert_bias: biases in experts and shared expert.
        expert_ratio: F / D of one expert; 0 = ``mlp_ratio``.
        shared_ratio: hidden width of the shared expert, in units of D.
        affinity: of a token to the experts, from the router's logits: "softmax", "sigmoid", or
            (expert choice) "identity".
        normalize: "none" = raw affinities as routing weights, "per_token" = they sum to 1.
        routing_scale: constant that multiplies the routing weights.
        rounding: of the capacity S * capacity_factor / E (expert choice).
        capacity_multiple_of: the capacity is rounded to a multiple of this (expert choice).

    Raises:
        ValueError: names the field, its value and what is expected.
    """

    family: Family
    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    in_channels: int
    out_channels: int
    image_size: int
    num_kv_heads: int | None = None
    num_classes: int = 0
    text_dim: int = 0
    mlp_ratio: float = 4.0
    mlp_bias: bool = True
    qkv_bias: bool = True
    mlp_activation: ExpertActivation = "gelu_tanh"
    qk_norm: bool = False
    qk_norm_kind: QKNormKind = "layer_norm"
    positions: Positions = "sincos"
    rope_theta: float = 10000.0
    mask_decoder_depth: int = 0
    time_scale: float = 1.0
    time_frequency_shift: int = 0
    num_experts: int = 0
    routing: str | None = None
    # Not hashed: a dictionary cannot be.
    routing_options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    max_timestep: float = 1.0
    top_k: int = 0
    capacity_factor: float = 0.0
    group: str | int = "image"
    moe_every: int = 1
    expert_activation: ExpertActivation = "gelu_tanh"
    expert_bias: bool = False
    expert_ratio: float = 0.0
    shared_ratio: float = 0.0
    affinity: Affinity = "softmax"
    normalize: Normalize = "none"
    routing_scale: float = 1.0
    rounding: Rounding = "floor"
    capacity_multiple_of: int = 1

    def __post_init__(self) -> None:
        self._check_types()
        self._check_shapes()
        self._check_backbone()
        self._check_routing()

    def _check_types(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                _fail(name, getattr(self, name), f"expected one of {', '.join(choices)}")
        for name in _POSITIVE_INTS + _NON_NEGATIVE_INTS:
            value = getattr(self, name)
            if value is None and name == "num_kv_heads":
                continue
            least = 1 if name in _POSITIVE_INTS else 0
            if not _is_int(value) or value < least:
                _fail(name, value, f"expected an integer of at least {least}")
        for name in _POSITIVE_FLOATS + _NON_NEGATIVE_FLOATS:
            value = getattr(self, name)
            number = isinstance(value, float) or _is_int(value)
            if not number or not 0 <= value < float("inf"):
                _fail(name, value, "expected a finite number that is not negative")
            if value == 0 and name in _POSITIVE_FLOATS:
                _fail(name, value, "expected a number above 0")
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                _fail(name, getattr(self, name), "expected true or false")
        group = self.group
        if group not in ("image", "batch") and not (_is_int(group) and int(group) > 0):
            _fail("group", group, 'expected "image", "batch" or a positive number of tokens')

    def _check_shapes(self) -> None:
        if self.hidden_size % self.num_heads:
            _fail(
                "num_heads", self.num_heads, f"expected a divisor of hidden_size={self.hidden_size}"
            )
        if self.hidden_size % 4:
            _fail(
                "hidden_size", self.hidden_size, "expected a multiple of 4 (2-D sin-cos positions)"
            )
        if self.num_heads % self.kv_heads:
            _fail(
                "num_kv_heads",
                self.num_kv_heads,
                f"expected a divisor of num_heads={self.num_heads}",
            )
        if self.image_size % self.patch_size:
            _fail(
                "image_size",
                self.image_size,
                f"expected a multiple of patch_size={self.patch_size}",
            )
        for name in ("mlp_ratio", "expert_ratio", "shared_ratio"):
            width = getattr(self, name) * self.hidden_size
            if width != int(width):
                reason = f"times hidden_size={self.hidden_size} is {width}: expected a whole number"
                _fail(name, getattr(self, name), reason)

    def _check_backbone(self) -> None:
        head_dim = self.hidden_size // self.num_heads
        if self.positions != "sincos" and head_dim % 4:
            reason = f"rotations by row and column need heads of a multiple of 4, not {head_dim}"
            _fail("positions", self.positions, reason)
        if self.mask_decoder_depth >= self.depth:
            reason = f"expected below depth={self.depth}"
            _fail("mask_decoder_depth", self.mask_decoder_depth, reason)
        if self.time_frequency_shift > 1:
            _fail("time_frequency_shift", self.time_frequency_shift, "expected 0 or 1")
        has_effect = (
            ("rope_theta", self.positions != "sincos", 'positions="sincos" has no rotations'),
            ("qk_norm_kind", self.qk_norm, "qk_norm=False has no norm"),
            ("mlp_activation", len(self.moe_blocks) < self.depth, "no block is dense"),
        )
        for name, used, reason in has_effect:
            default = type(self).__dataclass_fields__[name].default
            if not used and getattr(self, name) != default:
                _fail(name, getattr(self, name), f"{reason}: leave it at {default!r}")

    def _check_routing(self) -> None:
        used: tuple[str, ...] = ()
        if self.family != "dit":
            options = self._checked_routing()
            used = (*_MOE_FIELDS, *self.routing_idea.fields)
            if self.reads_noise_levels:
                used = (*used, "max_timestep")
            self.routing_idea.check(self, options)
        if self.affinity == "identity" and self.normalize == "per_token":
            _fail(
                "normalize",
                self.normalize,
                'raw logits can sum to 0: affinity "identity" has "none"',
            )
        if self.family != "dit" and self.moe_every > self.depth:
            _fail("moe_every", self.moe_every, f"expected at most depth={self.depth}")
        for name in (*_MOE_FIELDS, *_ROUTING_FIELDS):
            default = default_of(type(self).__dataclass_fields__[name])
            if name not in used and getattr(self, name) != default:
                owner = f"family {self.family!r}"
                if self.family != "dit":
                    owner = f"routing {self.routing_idea.name!r}"
                reason = f"{owner} does not use it: leave it at {default!r}"
                _fail(name, getattr(self, name), reason)

    def _checked_routing(self) -> Any:
        """The options of a routing that exists and belongs to the family."""
        known = [name for name, idea in ROUTINGS.items() if idea.family == self.family]
        if self.routing is not None and self.routing not in known:
            reason = f"family {self.family!r} has {', '.join(known)}"
            _fail("routing", self.routing, reason)
        if not isinstance(self.routing_options, dict):
            _fail("routing_options", self.routing_options, "expected options by name")
        # As JSON has them, so that a configuration equals the one that was read back.
        object.__setattr__(self, "routing_options", _with_lists(self.routing_options))
        return self.own_routing_options

    @property
    def routing_idea(self) -> Routing:
        """How tokens find experts; only for a family with experts."""
        return ROUTINGS[self.routing or DEFAULTS[self.family]]

    @property
    def own_routing_options(self) -> Any:
        """``routing_options`` as the dataclass of the routing."""
        return make_options(self.routing_idea, self.routing_options)

    @property
    def reads_noise_levels(self) -> bool:
        """Whether the routers read the noise level of each image."""
        return self.family != "dit" and self.routing_idea.reads_noise_levels(
            self.own_routing_options
        )

    @property
    def pools_images(self) -> bool:
        """Whether images of a batch compete for experts."""
        return self.family != "dit" and self.routing_idea.pools_images(self)

    @property
    def kv_heads(self) -> int:
        """Key and value heads, ``num_heads`` where ``num_kv_heads`` is ``None``."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def seq_len(self) -> int:
        """Tokens S of an image of ``image_size``."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def intermediate_size(self) -> int:
        """Hidden width F of the dense FFN."""
        return int(self.mlp_ratio * self.hidden_size)

    @property
    def expert_intermediate_size(self) -> int:
        """Hidden width F of one expert."""
        return int((self.expert_ratio or self.mlp_ratio) * self.hidden_size)

    @property
    def shared_intermediate_size(self) -> int:
        """Hidden width of the shared expert, 0 without one."""
        return int(self.shared_ratio * self.hidden_size)

    @property
    def moe_blocks(self) -> tuple[int, ...]:
        """0-based indices of the blocks whose FFN is a mixture of experts."""
        if self.num_experts == 0:
            return ()
        return tuple(i for i in range(self.depth) if (i + 1) % self.moe_every == 0)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dictionary, in order of declaration."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of ``to_dict``; left-out fields take their defaults.

        Raises:
            ValueError: an unknown key, a missing one without default, or a value out of range.
        """
        fields = cls.__dataclass_fields__
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(f"unknown model fields {unknown}; known: {', '.join(fields)}")
        required = (name for name, f in fields.items() if default_of(f) is dataclasses.MISSING)
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"missing model fields {missing}: give them a value")
        return cls(**values)


_MOE_FIELDS = ("num_experts", "moe_every", "expert_activation", "expert_bias", "expert_ratio",
               "shared_ratio", "routing", "routing_options", "affinity", "normalize",
               "routing_scale")  # fmt: skip
# Those of which a routing reads some.
_ROUTING_FIELDS = (
    "capacity_factor", "group", "rounding", "capacity_multiple_of", "top_k", "max_timestep",
)  # fmt: skip


def default_of(field: Any) -> Any:
    """The default of a dataclass field, ``MISSING`` where it has none."""
    has_factory = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if has_factory else field.default


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_lists(each) for name, each in value.items()}
    return [_with_lists(each) for each in value] if isinstance(value, (list, tuple)) else value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fail(name: str, value: object, reason: str) -> None:
    raise ValueError(f"ModelConfig.{name}={value!r}: {reason}")
