"""What a precompute run is asked for, and which of it its result depends on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_models.text import DTYPES

KINDS = ("auto", "embedded", "folder", "webdataset", "huggingface")
LATENT_KINDS = ("moments", "mean", "sample")
CONDITIONS = ("auto", "labels", "captions")


@dataclass(frozen=True)
class Settings:
    """The command line; see ``python -m dit_models.precompute --help``."""

    source: str
    out: Path
    kind: str = "auto"
    split: str = "train"
    image_size: int | None = None
    flip: bool = False
    conditions: str = "auto"
    image_column: str = ""
    label_column: str = ""
    caption_column: str = ""
    subset: str = ""
    vae: str = "none"
    vae_dtype: str = "fp32"
    latents: str = "moments"
    dtype: str = "fp16"
    text: str = "none"
    text_revision: str = "main"
    text_length: int | None = None
    text_layer: int | None = None
    text_dtype: str = "fp32"
    shard_size: int = 2048
    batch_size: int = 16
    seed: int = 0
    skip_broken: bool = False
    device: str = "auto"
    processes: int = 1

    def validate(self) -> "Settings":
        """Return self when every value makes sense.

        Raises:
            ValueError: names the option, its value and what is expected.
        """
        choices = {
            "kind": KINDS,
            "conditions": CONDITIONS,
            "vae_dtype": tuple(DTYPES),
            "latents": LATENT_KINDS,
            "dtype": tuple(DTYPES),
            "text_dtype": tuple(DTYPES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{_option(name)} {getattr(self, name)}; expected {', '.join(allowed)}."
                )
        for name, least in (("shard_size", 1), ("batch_size", 1), ("processes", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{_option(name)} {getattr(self, name)}; expected >= {least}.")
        without_vae = {"vae_dtype": "fp32", "latents": "moments"} if self.vae == "none" else {}
        without_text = {"text_length": None, "text_layer": None, "text_dtype": "fp32",
                        "text_revision": "main"} if self.text == "none" else {}  # fmt: skip
        for needs, defaults in (("--vae", without_vae), ("--text", without_text)):
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    raise ValueError(f"{_option(name)} has no effect without {needs}.")
        return self


def differing(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """The settings that two runs do not share, a line each with both values."""
    return [
        f"{name}: {saved.get(name)!r} before, {asked.get(name)!r} now"
        for name in sorted(saved.keys() | asked.keys())
        if saved.get(name) != asked.get(name)
    ]


def refuse_split(settings: Settings, what: str) -> None:
    """Raise ValueError where a split is asked of a source that has none."""
    if settings.split != "train":
        raise ValueError(
            f"--split {settings.split} has no effect on {what}; name the files of that split."
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
