"""A backbone with its conditioning: class labels or captions in, predictions out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dit_models.backbone import DiT
from dit_models.outputs import DiTOutput
from dit_models.text import NULL_CAPTION, ByteTextEncoder, PretrainedText, TextFeatures


class ConditionedModel(nn.Module):
    """A diffusion transformer together with what is trained of its text encoder, if any.

    Args:
        backbone: the transformer.
        text_encoder: for a text-conditional backbone (``config.text_dim > 0``), else ``None``.
            Of a pretrained one, the frozen weights are in no state dict.

    Raises:
        ValueError: when the one has text and the other has not, or their widths differ.
    """

    def __init__(
        self, backbone: DiT, text_encoder: ByteTextEncoder | PretrainedText | None = None
    ) -> None:
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
        self,
        labels: Tensor | None = None,
        captions: Sequence[str] | None = None,
        text: TextFeatures | None = None,
    ) -> dict[str, Tensor]:
        """Keyword tensors for ``forward``: labels as they are, captions encoded.

        Args:
            labels: (B,) int64 class indices; ``num_classes`` is the null class.
            captions: B strings; the empty one is the null caption.
            text: instead of captions, what the model's pretrained encoder made of them earlier.

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
            if text is not None:
                if not isinstance(self.text_encoder, PretrainedText):
                    raise ValueError("this model encodes captions itself; give captions, not text.")
                features, mask = self.text_encoder(text)
            elif captions is not None:
                features, mask = self.text_encoder.encode(captions)
            else:
                raise ValueError("captions=None: this model is conditioned on captions.")
            conditions["text"], conditions["text_mask"] = features, mask
        return conditions

    def null_condition(self, batch_size: int) -> dict[str, Tensor]:
        """The condition of unconditional predictions: null class, null caption."""
        config = self.backbone.config
        device = next(self.parameters()).device
        labels = None
        if config.num_classes:
            labels = torch.full((batch_size,), config.num_classes, device=device)
        return self.condition(labels, [NULL_CAPTION] * batch_size)
