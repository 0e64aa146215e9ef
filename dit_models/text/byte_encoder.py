"""A small trainable text encoder over UTF-8 bytes, for captions without a pretrained encoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_models.attention import NORM_EPS, SelfAttention
from dit_models.dit import DenseFFN
from dit_models.initialization import EMBEDDING_STD, reset_layers

BOS, EOS, PAD = 256, 257, 258  # above the 256 byte values
VOCABULARY_SIZE = 259


class TextEncoderLayer(nn.Module):
    """Pre-norm transformer layer over masked tokens, (B, L, D) -> (B, L, D)."""

    def __init__(self, text_dim: int, num_heads: int, **factory: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(text_dim, eps=NORM_EPS, **factory)
        self.attn = SelfAttention(text_dim, num_heads, **factory)
        self.norm2 = nn.LayerNorm(text_dim, eps=NORM_EPS, **factory)
        self.ffn = DenseFFN(text_dim, 4 * text_dim, **factory)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, D), mask (B, L) bool, True = a token."""
        x = x + self.attn(self.norm1(x), mask)
        return x + self.ffn(self.norm2(x))[0]


class ByteTextEncoder(nn.Module):
    """Transformer encoder over [BOS] bytes [EOS], trained together with the model.

    Args:
        text_dim: width of the features, a multiple of ``num_heads``.
        max_length: longest token sequence, BOS and EOS included.
        depth: number of layers.
        num_heads: attention heads.
        device, dtype: where the parameters are made.

    Raises:
        ValueError: a size that is not positive, or ``text_dim`` not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        text_dim: int,
        max_length: int = 128,
        depth: int = 2,
        num_heads: int = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"text_dim": text_dim, "depth": depth, "num_heads": num_heads}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        if max_length < 2:
            raise ValueError(f"max_length={max_length}: expected at least 2, for BOS and EOS")
        if text_dim % num_heads:
            raise ValueError(f"text_dim={text_dim}: expected a multiple of num_heads={num_heads}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.text_dim = text_dim
        self.max_length = max_length
        self.token_embedding = nn.Embedding(VOCABULARY_SIZE, text_dim, **factory)
        self.position_embedding = nn.Embedding(max_length, text_dim, **factory)
        self.layers = nn.ModuleList(
            TextEncoderLayer(text_dim, num_heads, **factory) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(text_dim, eps=NORM_EPS, **factory)
        self.reset_parameters()

    def tokenize(
        self, captions: Sequence[str], *, pad_to_max: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Captions to byte tokens.

        Args:
            captions: B strings; the empty one is the null caption [BOS][EOS].
            pad_to_max: pad to ``max_length`` (one shape for every batch) instead of to the
                longest caption.

        Returns:
            tokens (B, L) int64 and mask (B, L) bool (True = a token), on the encoder's device.

        Raises:
            ValueError: no captions, a single string, or a caption too long.
        """
        if isinstance(captions, str) or not captions:
            raise ValueError(f"captions={captions!r}: expected a non-empty list of strings")
        sequences = [[BOS, *caption.encode("utf-8"), EOS] for caption in captions]
        lengths = [len(sequence) for sequence in sequences]
        for caption, length in zip(captions, lengths, strict=True):
            if length > self.max_length:
                raise ValueError(
                    f"caption of {length - 2} UTF-8 bytes is {length} tokens with BOS and EOS, "
                    f"max_length is {self.max_length}: shorten it ({caption[:40]!r}...)"
                )
        width = self.max_length if pad_to_max else max(lengths)
        padded = [sequence + [PAD] * (width - len(sequence)) for sequence in sequences]
        device = self.token_embedding.weight.device
        tokens = torch.tensor(padded, dtype=torch.int64, device=device)
        return tokens, tokens != PAD

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Encode tokens (B, L) int64 under mask (B, L) bool as (B, L, text_dim).

        Padding changes no output of a token, and outputs at padding are exactly 0.

        Raises:
            ValueError: shapes that differ, or more tokens than ``max_length``.
        """
        if tokens.ndim != 2 or tokens.shape != mask.shape:
            raise ValueError(
                f"tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)}: "
                "expected one shape (B, L)"
            )
        if tokens.shape[1] > self.max_length:
            raise ValueError(f"{tokens.shape[1]} tokens: expected at most {self.max_length}")
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x) * mask[:, :, None].to(x.dtype)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (B, max_length, text_dim) and mask (B, max_length) bool of B captions.

        One length for every batch, so that null captions can stand beside others.
        """
        tokens, mask = self.tokenize(captions, pad_to_max=True)
        return self(tokens, mask), mask

    def reset_parameters(self) -> None:
        """Xavier-uniform Linear layers, normal 0.02 on both embeddings."""
        reset_layers(self)
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=EMBEDDING_STD)
