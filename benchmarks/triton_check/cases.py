"""Which calls are recorded: every op of the backend at the sizes it is meant for."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer, with the letters of the tensors' shapes.

    Attributes:
        T, D, F, E: tokens, hidden size, intermediate size of an expert, experts.
        R: rows of all experts together.
        G: groups that experts choose in; images.
        K: experts of a token; 0 where experts choose.
    """

    T: int
    D: int
    F: int
    E: int
    R: int
    G: int = 1
    K: int = 0


def token_choice(tokens: int, hidden: int, inner: int, experts: int, top_k: int) -> Sizes:
    """Every token takes ``top_k`` experts."""
    return Sizes(tokens, hidden, inner, experts, tokens * top_k, K=top_k)


def expert_choice(batch: int, seq_len: int, hidden: int, experts: int) -> Sizes:
    """Capacity factor 2, experts four times as wide as the tokens."""
    rows = batch * experts * (2 * seq_len // experts)
    return Sizes(batch * seq_len, hidden, 4 * hidden, experts, rows, G=batch)


SIZES = {
    "xl": token_choice(8192, 1152, 4608, 8, 2),  # DiT-MoE-XL, 32 images of 256 tokens
    "ec256": expert_choice(32, 256, 1152, 8),
    "ec1024": expert_choice(16, 1024, 1152, 16),
    "ec4096": expert_choice(4, 4096, 2048, 32),
    "pool": expert_choice(1, 65536, 1152, 16),  # experts choose among all tokens of a batch
    # Few and some rows an expert, for the configs that are shipped for them.
    "few": token_choice(128, 1152, 4608, 8, 2),
    "some": token_choice(1024, 1152, 4608, 8, 2),
    "odd": token_choice(1000, 200, 344, 6, 3),  # nothing is a multiple of 16 or of a tile
    # Every large tensor has more than 2^31 elements: for address arithmetic only.
    "huge": token_choice(1 << 21, 1152, 4608, 512, 2),
    "huge_ec": expert_choice(1 << 10, 2048, 1152, 64),
    "huge_logits": token_choice(1 << 24, 1152, 4608, 256, 2),
    "huge_pools": expert_choice(1 << 14, 2048, 1152, 128),
    "huge_pool": expert_choice(1, 1 << 25, 1152, 128),
}


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: key of ``calls.CALLS``.
        sizes: key of ``SIZES``.
        dtype: of tokens and weights.
        options: of the op, see ``calls``.
    """

    op: str
    sizes: str
    dtype: str = "bfloat16"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``op/sizes/dtype option=value ...``."""
        words = [f"{key}={value}" for key, value in self.options.items()]
        return " ".join([f"{self.op}/{self.sizes}/{self.dtype}", *words])


EXPERT_SIZES = ("ec256", "ec1024", "ec4096", "pool")
ALL_SIZES = ("xl", *EXPERT_SIZES[:3])
ACTIVATIONS = ("gelu_tanh", "gelu", "swiglu")


def _routing() -> Iterator[Case]:
    for affinity in ("softmax", "sigmoid", "identity"):
        yield Case("token_choice", "xl", "float32", {"affinity": affinity})
        yield Case("expert_choice", "ec256", "float32", {"affinity": affinity})
        yield Case("affinity", "xl", "float32", {"affinity": affinity})
    yield Case("token_choice", "xl", "float32", {"per_token": True, "bias": True})
    yield Case("token_choice", "xl", "float32", {"expert_groups": 4})
    yield Case("token_choice", "odd", "float32")
    for sizes in EXPERT_SIZES[1:]:
        yield Case("expert_choice", sizes, "float32")
    yield Case("expert_choice", "ec256", "float32", {"per_token": True})
    for sizes in ("xl", *EXPERT_SIZES, "odd"):
        yield Case("route_bwd", sizes, "float32")
        yield Case("similarity", sizes, "float32")
        yield Case("similarity_bwd", sizes, "float32")
    yield Case("route_bwd", "xl", "float32", {"affinity": "sigmoid", "per_token": True})
    yield Case("route_bwd", "xl", "float32", {"losses": False})
    yield Case("route_bwd", "ec256", "float32", {"per_token": True})


def _rows(dtype: str) -> Iterator[Case]:
    for sizes in (*ALL_SIZES, "odd"):
        yield Case("dispatch", sizes, dtype)
        yield Case("combine", sizes, dtype)
    for sizes in ("xl", "ec4096"):
        yield Case("combine", sizes, dtype, {"shared": True, "residual": True})
        yield Case("gather", sizes, dtype, {"weights": True, "values": True})
        yield Case("gather", sizes, dtype, {"weights": True})
        yield Case("sum_rows", sizes, dtype)
    for activation in ACTIVATIONS:
        yield Case("activation", "xl", dtype, {"activation": activation})
        yield Case("activation_bwd", "xl", dtype, {"activation": activation})


def _products() -> Iterator[Case]:
    gelu, swiglu = {"activation": "gelu_tanh"}, {"activation": "swiglu"}
    for op in ("expert_mlp", "expert_mlp_bwd"):
        for sizes in ALL_SIZES:
            yield Case(op, sizes, options=gelu)
        yield Case(op, "xl", options={"activation": "gelu"})
        yield Case(op, "ec256", options={**gelu, "bias": True})
        yield Case(op, "odd", options={**gelu, "bias": True})
        for sizes in ("xl", "ec4096"):
            yield Case(op, sizes, options=swiglu)
        for sizes in ("xl", "few", "some"):
            yield Case(op, sizes, options={**swiglu, "bias": True})
    for sizes in ("few", "some"):  # backward has one table for all activations
        yield Case("expert_mlp", sizes, options={**gelu, "bias": True})
    # The two kernels that differ where weights lie transposed; the others change places.
    yield Case("expert_mlp", "xl", options={**swiglu, "transposed": True})
    yield Case("expert_mlp_bwd", "xl", options={**gelu, "transposed": True})
    for sizes in ("xl", "ec4096", "odd"):
        yield Case("grouped_gemm", sizes)
        yield Case("grouped_gemm_bwd", sizes)


def _other_dtype(dtype: str) -> Iterator[Case]:
    """What differs between dtypes is the registers of a tile, so few sizes tell it."""
    yield Case("combine", "xl", dtype, {"shared": True, "residual": True})
    yield Case("gather", "xl", dtype, {"weights": True, "values": True})
    yield Case("dispatch", "odd", dtype)
    for activation in ("gelu_tanh", "swiglu"):
        yield Case("activation", "xl", dtype, {"activation": activation})
        yield Case("activation_bwd", "xl", dtype, {"activation": activation})
        # fp32 has a table of its own, with two configs in it.
        for sizes in ("xl",) if dtype == "float16" else ("xl", "few"):
            for op in ("expert_mlp", "expert_mlp_bwd"):
                yield Case(op, sizes, dtype, {"activation": activation, "bias": True})
    yield Case("grouped_gemm", "odd", dtype)


CASES: tuple[Case, ...] = (*_routing(), *_rows("bfloat16"), *_products())
# Compiled for record.OTHER_DTYPE_TARGETS alone.
OTHER_DTYPES: tuple[Case, ...] = (*_other_dtype("float16"), *_other_dtype("float32"))


def _huge() -> Iterator[Case]:
    for sizes in ("huge_logits", "huge_pools", "huge_pool"):
        router = "token_choice" if SIZES[sizes].K else "expert_choice"
        for per_token in (False, True):
            yield Case(router, sizes, "float32", {"per_token": per_token})
            yield Case("route_bwd", sizes, "float32", {"per_token": per_token})
        for op in ("affinity", "similarity", "similarity_bwd"):
            yield Case(op, sizes, "float32")
    for sizes in ("huge", "huge_ec"):
        for case in _rows("bfloat16"):
            if case.sizes == "xl":
                yield Case(case.op, sizes, case.dtype, case.options)
        for op in ("expert_mlp", "expert_mlp_bwd"):
            for activation in ("gelu_tanh", "swiglu"):
                yield Case(op, sizes, options={"activation": activation, "bias": True})
            yield Case(op, sizes, options={"activation": "swiglu", "transposed": True})
        yield Case("grouped_gemm", sizes)
        yield Case("grouped_gemm_bwd", sizes)


HUGE_CASES: tuple[Case, ...] = tuple(_huge())


def largest_index(case: Case) -> int:
    """Tokens, rows and counts of a case are at most this."""
    return max(SIZES[case.sizes].R, SIZES[case.sizes].T)
