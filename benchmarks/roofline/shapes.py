"""Layers that are counted, and the GPU that they are counted for."""

from dataclasses import dataclass

from moe_kernels.ops.pack import packed_sizes


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU: what its data sheet says, and what large products and copies reach."""

    name: str
    peak_flops: float
    peak_bytes: float
    reachable_flops: float
    reachable_bytes: float


H100 = Gpu("H100 SXM, bf16", 989e12, 3.35e12, 790e12, 3.0e12)


@dataclass(frozen=True)
class Layer:
    """A mixture-of-experts layer on a batch.

    Attributes:
        name: in the tables.
        num_tokens, hidden_size, intermediate_size, num_experts: T, D, F, E.
        num_rows: R, rows of all experts.
        num_groups: G, groups that experts choose in.
        top_k: K, experts of a token; 0 where experts choose.
        gated: SwiGLU, with two first matrices; else GELU.
    """

    name: str
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_rows: int
    num_groups: int = 1
    top_k: int = 0
    gated: bool = False

    @property
    def width(self) -> int:
        """Rows of an expert's first matrix, columns of h."""
        return (2 if self.gated else 1) * self.intermediate_size

    @property
    def num_indices(self) -> int:
        """Entries of the plan's index buffer."""
        return sum(
            packed_sizes(
                self.num_tokens, self.num_experts, self.num_groups, self.num_rows, self.top_k
            )
        )


def expert_choice(
    batch_size: int, seq_len: int, hidden_size: int, num_experts: int, capacity_factor: int = 2
) -> Layer:
    """GELU experts four times as wide as the tokens, routed inside each image."""
    return Layer(
        f"EC B{batch_size} S{seq_len} D{hidden_size} E{num_experts} c{capacity_factor}",
        batch_size * seq_len,
        hidden_size,
        4 * hidden_size,
        num_experts,
        batch_size * num_experts * (capacity_factor * seq_len // num_experts),
        num_groups=batch_size,
    )


def token_choice(
    name: str, tokens: int, hidden: int, inner: int, experts: int, top_k: int, gated: bool = False
) -> Layer:
    """Every token takes ``top_k`` experts."""
    return Layer(
        f"{name} T{tokens} D{hidden} F{inner} E{experts} K{top_k}",
        tokens,
        hidden,
        inner,
        experts,
        tokens * top_k,
        top_k=top_k,
        gated=gated,
    )


LAYERS = (
    expert_choice(32, 256, 1152, 8),
    expert_choice(16, 1024, 1152, 16),
    expert_choice(4, 4096, 2048, 32),
    token_choice("DiT-MoE-XL", 8192, 1152, 4608, 8, 2, gated=True),
    token_choice("DiT-MoE-XL", 32768, 1152, 4608, 8, 2, gated=True),
    # The shape that libraries for language models publish figures for.
    token_choice("SwiGLU", 32768, 2048, 768, 128, 8, gated=True),
)
