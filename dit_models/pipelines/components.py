"""Our models as components that diffusers saves and loads: config.json and safetensors."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from torch import Tensor

from dit_models.assemble import build_text_encoder
from dit_models.backbone import DiT
from dit_models.config import TextConfig, TrainConfig
from dit_models.data import DatasetInfo
from dit_models.extras import require
from dit_models.model_config import ModelConfig
from dit_models.models import build_model
from dit_models.outputs import DiTOutput
from dit_models.pretrained import tell_buffers
from dit_models.text import ByteTextEncoder, PretrainedText

_diffusers: Any = require("diffusers", extra="train")
# diffusers finds out how a component is loaded by these names in the component's module.
ModelMixin: Any = _diffusers.ModelMixin
ConfigMixin: Any = _diffusers.ConfigMixin
register_to_config = require("diffusers.configuration_utils", extra="train").register_to_config


class DiTTransformer(ModelMixin, ConfigMixin):
    """A ``DiT`` of any family.

    Args:
        model: the fields of its ``ModelConfig``.
        backbone: the model itself, instead of one with fresh weights.
    """

    ignore_for_config: ClassVar[list[str]] = ["backbone"]

    @register_to_config
    def __init__(self, model: dict[str, Any], backbone: DiT | None = None) -> None:
        super().__init__()
        shape = ModelConfig.from_dict(dict(model))
        self.backbone = build_model(shape) if backbone is None else backbone

    @classmethod
    def of(cls, backbone: DiT) -> "DiTTransformer":
        """The component around a model."""
        component: DiTTransformer = cls(backbone.config.to_dict(), backbone)
        return component.eval()

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """As ``ModelMixin.from_pretrained``, which with accelerate fills weights in place."""
        loaded = super().from_pretrained(*arguments, **options)
        tell_buffers(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @property
    def shape(self) -> ModelConfig:
        """The model's configuration."""
        return self.backbone.config

    def forward(self, latents: Tensor, timesteps: Tensor, **condition: Tensor) -> DiTOutput:
        """As ``DiT.forward``; ``.sample`` is the prediction."""
        return self.backbone(latents, timesteps, **condition)


class CaptionEncoder(ModelMixin, ConfigMixin):
    """The text encoder of a run, with tokenizer, projection and null caption.

    A pretrained encoder's own weights are not saved with it: ``config.json`` names the encoder, and
    the saved identity must fit when it is read.

    Args:
        text: the fields of ``TextConfig``.
        stored: ``DatasetInfo.text`` of the data that the model was trained on.
        text_dim: width of the features.
        encoder: the encoder itself, instead of one with fresh weights.
    """

    ignore_for_config: ClassVar[list[str]] = ["encoder"]

    @register_to_config
    def __init__(
        self,
        text: dict[str, Any],
        stored: dict[str, Any] | None,
        text_dim: int,
        encoder: ByteTextEncoder | PretrainedText | None = None,
    ) -> None:
        super().__init__()
        if encoder is None:
            info = DatasetInfo("", 1, 1, 0, True, text=None if stored is None else dict(stored))
            train = TrainConfig(text=TextConfig(**text))
            encoder = build_text_encoder(train, info, text_dim)
        self.encoder = encoder

    @classmethod
    def of(
        cls, encoder: ByteTextEncoder | PretrainedText, train: TrainConfig, info: DatasetInfo
    ) -> "CaptionEncoder":
        """The component around an encoder."""
        component: CaptionEncoder = cls(asdict(train.text), info.text, encoder.text_dim, encoder)
        return component.eval()

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (B, L, text_dim) and mask (B, L) bool of B captions."""
        return self.encoder.encode(captions)
