"""Self-attention and text cross-attention on ``F.scaled_dot_product_attention``."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_models.rope import Rotation, rotate

NORM_EPS = 1e-6


class SelfAttention(nn.Module):
    """Multi-head self-attention with grouped key and value heads, (B, S, D) -> (B, S, D).

    Args:
        hidden_size: D.
        num_heads: query heads; the head size is D / ``num_heads``.
        num_kv_heads: key and value heads, a divisor of ``num_heads``; ``None`` = ``num_heads``.
        qkv_bias: biases in the fused projection, whose rows are queries, then keys, then values.
        qk_norm: a norm over the head size on queries and keys (arXiv 2302.05442), before they are
            rotated.
        qk_norm_kind: "layer_norm", or "rms_norm" (x / rms(x) times a weight).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        qk_norm_kind: str = "layer_norm",
        **factory: Any,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = hidden_size // num_heads
        rows = (num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(hidden_size, rows, bias=qkv_bias, **factory)
        self.proj = nn.Linear(hidden_size, hidden_size, **factory)
        self.q_norm = _head_norm(self.head_dim, qk_norm, qk_norm_kind, factory)
        self.k_norm = _head_norm(self.head_dim, qk_norm, qk_norm_kind, factory)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, rotation: Rotation | None = None
    ) -> Tensor:
        """Attend inside each row of x (B, S, D), to the tokens where mask (B, S) bool is True.

        ``rotation`` turns queries and keys by the positions of their tokens.
        """
        heads = self.qkv(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        query, key, value = heads.split(sizes, dim=1)
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return self.proj(_attend(query, key, value, mask))


class CrossAttention(nn.Module):
    """Attention from image tokens to text tokens, (B, S, D), (B, L, text_dim) -> (B, S, D).

    Padding never changes an output; where a row of the mask holds no token at all, the attention
    is 0 and the output is the bias of ``proj``.
    """

    def __init__(
        self,
        hidden_size: int,
        text_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        qkv_bias: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        kv_size = (num_kv_heads or num_heads) * self.head_dim
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias, **factory)
        self.kv_proj = nn.Linear(text_dim, 2 * kv_size, bias=qkv_bias, **factory)
        self.proj = nn.Linear(hidden_size, hidden_size, **factory)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Read text (B, L, text_dim), where text_mask (B, L) bool is True, from x (B, S, D)."""
        query = self.q_proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        heads = self.kv_proj(text).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        key, value = heads.chunk(2, dim=1)
        return self.proj(_attend(query, key, value, text_mask))


def _head_norm(head_dim: int, enabled: bool, kind: str, factory: dict[str, Any]) -> nn.Module:
    if not enabled:
        return nn.Identity()
    norm = {"layer_norm": nn.LayerNorm, "rms_norm": _HeadRMSNorm}[kind]
    return norm(head_dim, eps=NORM_EPS, **factory)


class _HeadRMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` in the wider dtype of heads and weight, which autocast lets differ."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """query (B, heads, S, head_dim), key and value (B, kv_heads, L, head_dim), mask (B, L) bool."""
    groups = query.shape[1] // key.shape[1]
    if mask is None:
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=groups > 1)
        return out.transpose(1, 2).flatten(2)
    if groups > 1:
        # With a mask, CUDA has grouped heads only in the kernel that stores all scores.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # Attention kernels differ on a row without any key (NaN or 0), so such a row attends to
    # everything and its result is replaced.
    has_key = mask.any(dim=1)
    allowed = (mask | ~has_key[:, None])[:, None, None, :]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    out = torch.where(has_key[:, None, None, None], out, 0.0)
    return out.transpose(1, 2).flatten(2)
