"""What identifies the features of a pretrained text encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_models.extras import require
from dit_models.model_folder import identity_of, locate_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_LENGTH = 77
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model")


@dataclass(frozen=True)
class EncoderSpec:
    """A frozen text encoder and how it is used; everything that its features depend on.

    Attributes:
        encoder: folder or name; says where it is, not what it is.
        revision: branch, tag or commit of a name.
        identity: SHA-256 of its settings, tokenizer and weights.
        max_length: tokens that are read; a longer prompt is cut there.
        layer: -1 = the last hidden state (after the final norm, where the encoder has one), -2 =
            the input of its last layer, as Stable Diffusion 2 and XL read CLIP, and so on.
        dtype: "fp32", "bf16" or "fp16", of the computation and of what is kept.
        dim: width of the features.
    """

    encoder: str
    revision: str
    identity: str
    max_length: int
    layer: int
    dtype: str
    dim: int

    @property
    def features_key(self) -> str:
        """What two specs have in common when their features are the same."""
        return f"{self.identity}:{self.max_length}:{self.layer}:{self.dtype}"


def describe_encoder(
    encoder: str,
    *,
    revision: str = "main",
    max_length: int | None = None,
    layer: int | None = None,
    dtype: str = "fp32",
) -> EncoderSpec:
    """The spec of an encoder on disk or on the Hugging Face hub, without loading its weights.

    Args:
        encoder: folder or name.
        revision: of a name.
        max_length: tokens; ``None`` = 77.
        layer: see ``EncoderSpec``; ``None`` = -1.
        dtype: a name of ``DTYPES``.

    Raises:
        ValueError: the encoder cannot be had, or a value does not fit it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"text dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    folder = locate_model(encoder, revision)
    if Path(encoder).is_dir() and revision != "main":
        raise ValueError(f"text revision {revision!r} has no effect on the folder {encoder}.")
    config = text_config_of(folder)
    length = DEFAULT_LENGTH if max_length is None else max_length
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"text max_length is {length}; {encoder} reads at most {limit} tokens.")
    index, depth = -1 if layer is None else layer, config.num_hidden_layers
    if not -depth <= index <= -1:
        raise ValueError(f"text layer is {index}; {encoder} has {depth} layers: -1 to {-depth}.")
    tokenizer = tokenizer_folder(folder)
    identity = identity_of(folder, None if tokenizer == folder else tokenizer)
    if Path(encoder).is_dir():
        encoder = str(folder.resolve())  # other commands may run in other folders
    return EncoderSpec(encoder, revision, identity, length, index, dtype, config.hidden_size)


def model_config_of(folder: Path) -> Any:
    """The ``transformers`` configuration in a folder.

    Raises:
        ValueError: when there is none.
    """
    transformers = require("transformers", extra="data")
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is not the folder of a transformers model: {str(error).splitlines()[0]}"
        ) from error


def text_config_of(folder: Path) -> Any:
    """The configuration of the part that reads text (a CLIP or a multimodal model has more)."""
    config = model_config_of(folder)
    return config if config.is_encoder_decoder else config.get_text_config()


def tokenizer_folder(folder: Path) -> Path:
    """Where an encoder's tokenizer is: beside the weights, or as in a diffusers pipeline.

    There ``text_encoder_2`` has its tokenizer in the folder ``tokenizer_2`` next to it.

    Raises:
        ValueError: when there is no tokenizer.
    """
    sibling = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    for place in (folder, sibling):
        if any((place / name).is_file() for name in _TOKENIZER_FILES):
            return place
    raise ValueError(f"{folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); put it there.")
