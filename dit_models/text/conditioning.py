"""Features of a frozen encoder as a model reads them: padded, projected, with a null caption."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit_models.data.base import pad_rows
from dit_models.initialization import EMBEDDING_STD, reset_layers
from dit_models.text.frozen import FrozenEncoder

NULL_CAPTION = ""
NULL_KINDS = ("empty", "zeros", "learned")


class TextFeatures(NamedTuple):
    """Encoded captions of a batch, as a frozen encoder gave them.

    Attributes:
        features: (B, L, dim); what stands at padding does not matter.
        mask: (B, L) bool, True = a token.
        is_null: (B,) bool, True where the caption is the null one.
    """

    features: Tensor
    mask: Tensor
    is_null: Tensor

    def part(self, where: slice) -> "TextFeatures":
        """Some of the captions."""
        return TextFeatures(self.features[where], self.mask[where], self.is_null[where])

    def to(self, device: torch.device) -> "TextFeatures":
        """The same on another device."""
        return TextFeatures(*(each.to(device) for each in self))


class PretrainedText(nn.Module):
    """The trained part of a pretrained text encoder: a projection and a null caption, if any.

    Args:
        frozen: the encoder; in no state dict. Its identity is, and loading the weights of a model
            that was trained with another encoder is an error.
        text_dim: width of the projected features; ``None`` = the encoder's, without a projection.
        null: what the null caption (the empty string) becomes: "empty" = the encoding of the
            empty string, "zeros" = one token of zeros, "learned" = one trained token. All have the
            same shape, so null captions can stand beside others.

    Attributes:
        text_dim: width of the features that the model reads.
        max_length: their number L.
    """

    identity: Tensor

    def __init__(
        self, frozen: FrozenEncoder, text_dim: int | None = None, null: str = "empty"
    ) -> None:
        super().__init__()
        if null not in NULL_KINDS:
            raise ValueError(f"text.null={null!r}; expected one of {', '.join(NULL_KINDS)}.")
        self.frozen = frozen
        self.null = null
        self.text_dim = frozen.spec.dim if text_dim is None else text_dim
        self.max_length = frozen.spec.max_length
        self.projection = None if text_dim is None else nn.Linear(frozen.spec.dim, text_dim)
        if self.projection is not None:
            reset_layers(self)
        self.null_token = (
            nn.Parameter(torch.randn(self.text_dim) * EMBEDDING_STD) if null == "learned" else None
        )
        digest = torch.tensor(list(bytes.fromhex(frozen.spec.identity)), dtype=torch.uint8)
        self.register_buffer("identity", digest)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (B, max_length, text_dim) and mask (B, max_length) bool of B captions.

        Raises:
            ValueError: no captions, or a single string.
        """
        if isinstance(captions, str) or not captions:
            raise ValueError(f"captions={captions!r}: expected a non-empty list of strings")
        device = self.identity.device
        rows = self.frozen.encode(captions, device)
        is_null = torch.tensor([caption == NULL_CAPTION for caption in captions])
        return self(TextFeatures(*pad_rows(rows, self.max_length), is_null.to(device)))

    def forward(self, text: TextFeatures) -> tuple[Tensor, Tensor]:
        """Project features and put the null caption in its place.

        Args:
            text: features (B, L, dim) of the frozen encoder.

        Returns:
            features (B, L, text_dim), zeros at padding, and mask (B, L) bool.

        Raises:
            ValueError: features of another width.
        """
        if text.features.ndim != 3 or text.features.shape[2] != self.frozen.spec.dim:
            raise ValueError(
                f"text features have shape {tuple(text.features.shape)}; expected "
                f"(B, L, {self.frozen.spec.dim}), as {self.frozen.spec.encoder} gives them."
            )
        dtype = torch.float32 if self.projection is None else self.projection.weight.dtype
        # Whatever the padding holds: 0 times NaN would spread.
        features = text.features.to(dtype).masked_fill(~text.mask[:, :, None], 0)
        mask = text.mask
        if self.projection is not None:
            features = self.projection(features)
        if self.null != "empty":
            first = torch.arange(mask.shape[1], device=mask.device) == 0
            is_null = text.is_null[:, None]
            mask = torch.where(is_null, first, mask)
            token = (
                features.new_zeros(self.text_dim)
                if self.null_token is None
                else (self.null_token.to(features.dtype))
            )
            features = torch.where(is_null[:, :, None], token, features)
        return features * mask[:, :, None].to(features.dtype), mask

    def reset_parameters(self) -> None:
        """Xavier-uniform projection, normal 0.02 null token."""
        if self.projection is not None:
            reset_layers(self)
        if self.null_token is not None:
            nn.init.normal_(self.null_token, std=EMBEDDING_STD)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        saved = state_dict.get(f"{prefix}identity")
        if saved is not None and not torch.equal(saved.cpu(), self.identity.cpu()):
            raise RuntimeError(
                f"these weights were trained with the text encoder of SHA-256 "
                f"{bytes(saved.tolist()).hex()[:16]}...; {self.frozen.spec.encoder} has "
                f"{self.frozen.spec.identity[:16]}..."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
