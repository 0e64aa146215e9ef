"""A pretrained text encoder from ``transformers``: loaded when first needed, never trained."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_models.extras import require
from dit_models.model_folder import identity_of, locate_model
from dit_models.text.cache import EmbeddingCache
from dit_models.text.spec import DTYPES, EncoderSpec, model_config_of, tokenizer_folder

# Prompts that go through the encoder at once.
_BATCH_SIZE = 32


class FrozenEncoder:
    """Prompts to features (n, dim) of their n real tokens, with a cache on disk.

    Copies share the loaded weights, which are in no state dict: a checkpoint knows the encoder by
    its identity.

    Args:
        spec: which encoder and how it is used; its identity is checked when it is loaded.
        cache: where features are kept, if anywhere.

    Attributes:
        cut: prompts so far that were longer than ``spec.max_length``.
    """

    def __init__(self, spec: EncoderSpec, cache: EmbeddingCache | None = None) -> None:
        self.spec = spec
        self.cache = cache
        self.cut = 0
        self._model: nn.Module | None = None
        self._tokenizer: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenEncoder":
        return self

    def encode(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> list[Tensor]:
        """Features of each prompt: (n, dim) in the spec's dtype, padding left out.

        Every prompt is padded to ``max_length`` when it is encoded, and equal ones are encoded
        once, so features depend on the other prompts by rounding at most.

        Raises:
            ValueError: when the encoder is not what the spec says.
        """
        found: dict[str, Tensor] = {}
        if self.cache is not None:
            for prompt in dict.fromkeys(prompts):
                if (features := self.cache.load(self.spec, prompt)) is not None:
                    found[prompt] = features.to(device)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        for start in range(0, len(missing), _BATCH_SIZE):
            part = missing[start : start + _BATCH_SIZE]
            for prompt, features in zip(part, self._run(part, device), strict=True):
                found[prompt] = features
                if self.cache is not None:
                    self.cache.save(self.spec, prompt, features)
        return [found[prompt] for prompt in prompts]

    def load(self, device: torch.device | str = "cpu") -> nn.Module:
        """The encoder itself, in eval mode on ``device``.

        Raises:
            ValueError: it is not there, cannot be read, or has another identity than the spec.
        """
        if self._model is None:
            folder, words = self._checked_folders()
            transformers = require("transformers", extra="data")
            try:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                    words, local_files_only=True
                )
                model, report = _encoder_class(transformers, folder).from_pretrained(
                    folder,
                    dtype=DTYPES[self.spec.dtype],
                    local_files_only=True,
                    output_loading_info=True,
                )
            except (OSError, ValueError) as error:
                raise ValueError(f"cannot load the text encoder {folder}: {error}") from error
            if missing := sorted(report["missing_keys"]):
                # The library would go on with random numbers in their place.
                raise ValueError(
                    f"the weights of the text encoder {folder} lack {len(missing)} tensors: "
                    f"{', '.join(missing[:5])}"
                )
            self._model = model.eval().requires_grad_(False)
            if self._tokenizer.pad_token is None:
                self._tokenizer.pad_token = self._tokenizer.eos_token
            # A causal encoder then never sees padding before a token.
            self._tokenizer.padding_side = "right"
        return self._model.to(device)

    def why_missing(self) -> str | None:
        """Why the encoder cannot be loaded here; ``None`` when it is there."""
        try:
            self._checked_folders()
        except ValueError as error:
            return f"no text encoder: {error} Set text.encoder to its folder."
        return None

    def _checked_folders(self) -> tuple[Path, Path]:
        """The folders of the weights and of the tokenizer, which are those of the spec."""
        folder = locate_model(self.spec.encoder, self.spec.revision)
        words = tokenizer_folder(folder)
        identity = identity_of(folder, None if words == folder else words)
        if identity != self.spec.identity:
            raise ValueError(
                f"the text encoder {self.spec.encoder} has the SHA-256 {identity[:16]}..., "
                f"expected {self.spec.identity[:16]}...: it is not the one that the features "
                "are from, so text.encoder has to name another folder."
            )
        return folder, words

    def _run(self, prompts: list[str], device: torch.device | str) -> list[Tensor]:
        model = self.load(device)
        tokens = self._tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.spec.max_length,
            return_overflowing_tokens=False,
            return_tensors="pt",
        )
        mask = tokens["attention_mask"].bool()
        self._count_cut(prompts, mask)
        wanted = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        on_device = {name: value.to(device) for name, value in wanted.items()}
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            if self.spec.layer == -1:
                hidden = model(**on_device).last_hidden_state
            else:
                states = model(**on_device, output_hidden_states=True).hidden_states
                hidden = states[self.spec.layer]
        hidden = hidden.to(DTYPES[self.spec.dtype])
        # Padding stands at the right; its place is known without asking the device.
        return [row[:n].clone() for row, n in zip(hidden, mask.sum(1).tolist(), strict=True)]

    def _count_cut(self, prompts: list[str], mask: Tensor) -> None:
        """Say once that prompts are cut; only those that fill ``max_length`` can have been."""
        full = [prompt for prompt, kept in zip(prompts, mask, strict=True) if bool(kept.all())]
        for prompt in full:
            length = len(self._tokenizer(prompt)["input_ids"])
            if length <= self.spec.max_length:
                continue
            if not self.cut:
                warnings.warn(
                    f"a prompt of {length} tokens is cut to text max_length="
                    f"{self.spec.max_length}: {prompt[:60]!r}...; others are counted, not named.",
                    stacklevel=2,
                )
            self.cut += 1


def _encoder_class(transformers: Any, folder: Any) -> Any:
    """The class that computes text features only."""
    config = model_config_of(folder)
    if config.model_type == "clip":
        return transformers.CLIPTextModel
    if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding  # of T5, the encoder alone
    return transformers.AutoModel
