"""A backbone with its conditioning: class labels or captions in, predictions out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dit_models.backbone import DiT
from dit_models.outputs import DiTOutput
from dit_models.text import ByteTextEncoder

NULL_CAPTION = ""


class ConditionedModel(nn.Module):
    """A diffusion transformer together with the text encoder that is trained with it, if any.

    Args:
        backbone: the transformer.
        text_encoder: for a text-conditional backbone (``config.text_dim > 0``), else ``None``.

    Raises:
        ValueError: when the one has text and the other has not, or their widths differ.
    """

    def __init__(self, backbone: DiT, text_encoder: ByteTextEncoder | None = None) -> None:
        super().__init__()
        text_dim = text_encoder.text_dim if text_encoder is not None else 0
        if backbone.config.text_dim != text_dim:
            raise ValueError(
                f"the backbone expects text_dim {backbone.config.text_dim}, the text encoder "
                f"gives {text_dim} (0 means none)."
            )
        self.backbone = backbone
        self.text_encoder = text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, **condition: Tensor) -> DiTOutput:
        """Predict from latents (B, C, H, W), timesteps (B,) and the result of ``condition``."""
        return self.backbone(latents, timesteps, **condition)

    def condition(
        self, labels: Tensor | None = None, captions: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Keyword tensors for ``forward``: labels as they are, captions encoded.

        Args:
            labels: (B,) int64 class indices; ``num_classes`` is the null class.
            captions: B strings; the empty one is the null caption.

        Raises:
            ValueError: when what the model is conditioned on is missing.
        """
        config = self.backbone.config
        conditions: dict[str, Tensor] = {}
        if config.num_classes:
            if labels is None:
                raise ValueError("labels=None: this model is conditioned on class labels.")
            conditions["labels"] = labels
        if self.text_encoder is not None:
            if captions is None:
                raise ValueError("captions=None: this model is conditioned on captions.")
            # One length for every batch, so that null captions can stand beside others.
            tokens, mask = self.text_encoder.tokenize(captions, pad_to_max=True)
            conditions["text"] = self.text_encoder(tokens, mask)
            conditions["text_mask"] = mask
        return conditions

    def null_condition(self, batch_size: int) -> dict[str, Tensor]:
        """The condition of unconditional predictions: null class, null caption."""
        config = self.backbone.config
        device = next(self.parameters()).device
        labels = None
        if config.num_classes:
            labels = torch.full((batch_size,), config.num_classes, device=device)
        return self.condition(labels, [NULL_CAPTION] * batch_size)
