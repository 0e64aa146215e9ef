"""Text encoders: the byte-level one that trains with a model, and frozen pretrained ones."""

from dit_models.text.byte_encoder import BOS, EOS, PAD, VOCABULARY_SIZE, ByteTextEncoder
from dit_models.text.cache import EmbeddingCache
from dit_models.text.conditioning import (
    NULL_CAPTION,
    NULL_KINDS,
    PretrainedText,
    TextFeatures,
)
from dit_models.text.frozen import FrozenEncoder
from dit_models.text.spec import DTYPES, EncoderSpec, describe_encoder

__all__ = [
    "BOS",
    "DTYPES",
    "EOS",
    "NULL_CAPTION",
    "NULL_KINDS",
    "PAD",
    "VOCABULARY_SIZE",
    "ByteTextEncoder",
    "EmbeddingCache",
    "EncoderSpec",
    "FrozenEncoder",
    "PretrainedText",
    "TextFeatures",
    "describe_encoder",
]
