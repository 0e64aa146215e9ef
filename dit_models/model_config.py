"""The shape of a model as data: one frozen dataclass for all three families."""

import dataclasses
from typing import Any, Literal, get_args

Family = Literal["dit", "dit_moe", "ec_dit"]
ExpertActivation = Literal["gelu_tanh", "gelu", "swiglu"]
Normalize = Literal["none", "per_token"]
Affinity = Literal["softmax", "sigmoid", "identity"]
Rounding = Literal["floor", "ceil"]

_POSITIVE_INTS = ("depth", "hidden_size", "num_heads", "num_kv_heads", "patch_size", "in_channels",
                  "out_channels", "image_size", "moe_every", "capacity_multiple_of")  # fmt: skip
_NON_NEGATIVE_INTS = ("num_classes", "text_dim", "num_experts", "top_k")
_POSITIVE_FLOATS = ("mlp_ratio", "time_scale", "routing_scale")
_NON_NEGATIVE_FLOATS = ("capacity_factor", "shared_ratio")
_BOOLS = ("mlp_bias", "qkv_bias", "qk_norm", "expert_bias")
_CHOICES = {
    "family": get_args(Family),
    "expert_activation": get_args(ExpertActivation),
    "affinity": get_args(Affinity),
    "normalize": get_args(Normalize),
    "rounding": get_args(Rounding),
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
        mlp_ratio: F / D of the dense FFN and of one expert.
        mlp_bias: biases in the dense FFN.
        qkv_bias: biases in the query, key and value projections.
        qk_norm: LayerNorm on queries and keys of the self-attention, per head.
        time_scale: multiplies the timesteps before their sinusoidal embedding.
        num_experts: experts E of a MoE layer.
        top_k: experts a token picks (token choice).
        capacity_factor: average number of experts a token gets (expert choice).
        group: tokens that compete for an expert: "image", "batch" or a number of tokens
            (expert choice).
        moe_every: 1 = every block is MoE, 2 = every second, the even ones counting from 1.
        expert_activation: activation of experts and shared expert; "swiglu" has a gate half.
        expert_bias: biases in experts and shared expert.
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
    qk_norm: bool = False
    time_scale: float = 1.0
    num_experts: int = 0
    top_k: int = 0
    capacity_factor: float = 0.0
    group: str | int = "image"
    moe_every: int = 1
    expert_activation: ExpertActivation = "gelu_tanh"
    expert_bias: bool = False
    shared_ratio: float = 0.0
    affinity: Affinity = "softmax"
    normalize: Normalize = "none"
    routing_scale: float = 1.0
    rounding: Rounding = "floor"
    capacity_multiple_of: int = 1

    def __post_init__(self) -> None:
        self._check_types()
        self._check_shapes()
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
        for name in ("mlp_ratio", "shared_ratio"):
            width = getattr(self, name) * self.hidden_size
            if width != int(width):
                reason = f"times hidden_size={self.hidden_size} is {width}: expected a whole number"
                _fail(name, getattr(self, name), reason)

    def _check_routing(self) -> None:
        if self.family == "dit":
            used: tuple[str, ...] = ()
        elif self.family == "dit_moe":
            used = (*_MOE_FIELDS, "top_k")
            if not 1 <= self.top_k <= self.num_experts:
                _fail("top_k", self.top_k, f"expected 1 to num_experts={self.num_experts}")
            if self.affinity == "identity":
                _fail("affinity", self.affinity, "token choice has softmax or sigmoid")
        else:
            used = (*_MOE_FIELDS, *_EXPERT_CHOICE_FIELDS)
            if not 0 < self.capacity_factor <= self.num_experts:
                reason = f"expected above 0 and at most num_experts={self.num_experts}"
                _fail("capacity_factor", self.capacity_factor, reason)
        if self.affinity == "identity" and self.normalize == "per_token":
            _fail(
                "normalize",
                self.normalize,
                'raw logits can sum to 0: affinity "identity" has "none"',
            )
        if self.family != "dit" and self.moe_every > self.depth:
            _fail("moe_every", self.moe_every, f"expected at most depth={self.depth}")
        for name in (*_MOE_FIELDS, *_EXPERT_CHOICE_FIELDS, "top_k"):
            default = type(self).__dataclass_fields__[name].default
            if name not in used and getattr(self, name) != default:
                reason = f"family {self.family!r} does not use it: leave it at {default!r}"
                _fail(name, getattr(self, name), reason)

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
        """Hidden width F of the dense FFN and of one expert."""
        return int(self.mlp_ratio * self.hidden_size)

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
        required = (name for name, f in fields.items() if f.default is dataclasses.MISSING)
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"missing model fields {missing}: give them a value")
        return cls(**values)


_MOE_FIELDS = ("num_experts", "moe_every", "expert_activation", "expert_bias", "shared_ratio",
               "affinity", "normalize", "routing_scale")  # fmt: skip
_EXPERT_CHOICE_FIELDS = ("capacity_factor", "group", "rounding", "capacity_multiple_of")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fail(name: str, value: object, reason: str) -> None:
    raise ValueError(f"ModelConfig.{name}={value!r}: {reason}")
