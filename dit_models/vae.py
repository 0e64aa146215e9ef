"""Images to latents and back, through diffusers' ``AutoencoderKL``."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_models.extras import require
from dit_models.model_folder import identity_of, locate_model
from dit_models.text.spec import DTYPES

# Of VAEs saved before their config had it, as diffusers takes it (that of Stable Diffusion 1).
_OLD_SCALING_FACTOR = 0.18215
# Images that are decoded at once: at 1024 pixels the decoder takes about 2 GB for each.
_DECODE_BATCH = 8


@dataclass(frozen=True)
class VAEInfo:
    """What is known of a VAE without its weights.

    Attributes:
        path: folder (or name) that it was read from.
        identity: SHA-256 of its settings and weights.
        channels: of an image.
        latent_channels: of a latent.
        downscale: pixels of an image for one of the latent, along a side.
        scaling_factor, shift_factor: latents are (z - shift_factor) * scaling_factor.
    """

    path: str
    identity: str
    channels: int
    latent_channels: int
    downscale: int
    scaling_factor: float
    shift_factor: float


class VAE:
    """A frozen VAE; latents are scaled as diffusion models read them.

    Args:
        path: folder of an ``AutoencoderKL``, or of a pipeline with one in ``vae``, or a name on
            the Hugging Face hub.
        device: where it runs.
        dtype: "fp32", "bf16" or "fp16" of its weights and activations.

    Raises:
        ValueError: there is no such VAE; says what to do.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu", dtype: str = "fp32") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"VAE dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
        self.info = describe_vae(path)
        folder = _folder_of(path)
        diffusers = require("diffusers", extra="train")
        try:
            self.model, report = diffusers.AutoencoderKL.from_pretrained(
                folder,
                torch_dtype=DTYPES[dtype],
                local_files_only=True,
                output_loading_info=True,
                low_cpu_mem_usage=False,  # or diffusers says that accelerate is missing
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the VAE {folder}: {error}") from error
        if missing := sorted(report["missing_keys"]):
            # The library would go on with random numbers in their place.
            raise ValueError(
                f"the weights of the VAE {folder} lack {len(missing)} tensors: "
                f"{', '.join(missing[:5])}"
            )
        self.model.to(device).eval().requires_grad_(False)
        self.model.disable_tiling()

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents of images.

        Args:
            images: (B, C, H, W) in [-1, 1]; grey ones are read as RGB.

        Returns:
            two tensors (B, latent_channels, H / downscale, W / downscale) fp32; a latent is
            mean + std * noise.

        Raises:
            ValueError: a size that is not a multiple of ``downscale``, or other channels.
        """
        info = self.info
        if images.shape[1] == 1 and info.channels == 3:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != info.channels or any(s % info.downscale for s in images.shape[2:]):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; this VAE reads {info.channels} channels "
                f"and sides that are multiples of {info.downscale}."
            )
        latents = self.model.encode(images.to(self.model.device, self.model.dtype)).latent_dist
        mean = (latents.mean.float() - info.shift_factor) * info.scaling_factor
        return mean, latents.std.float() * info.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) fp32 of scaled latents; values may lie a little outside [-1, 1].

        Raises:
            ValueError: latents of other channels.
        """
        if latents.shape[1] != self.info.latent_channels:
            raise ValueError(
                f"latents have {latents.shape[1]} channels; the VAE {self.info.path} decodes "
                f"{self.info.latent_channels}."
            )
        unscaled = latents.float() / self.info.scaling_factor + self.info.shift_factor
        unscaled = unscaled.to(self.model.device, self.model.dtype)
        parts = [self.model.decode(part).sample.float() for part in unscaled.split(_DECODE_BATCH)]
        return torch.cat(parts)


def describe_vae(path: str) -> VAEInfo:
    """What a VAE's folder says of it, without loading its weights.

    Raises:
        ValueError: there is no ``AutoencoderKL``.
    """
    folder = _folder_of(path)
    try:
        config = json.loads((folder / "config.json").read_text())
        kind = config.get("_class_name", "AutoencoderKL")
        if kind not in ("AutoencoderKL", "FlaxAutoencoderKL"):
            raise ValueError(f"it is that of a {kind}")
        found = VAEInfo(
            str(Path(path).resolve()) if Path(path).is_dir() else path,
            identity_of(folder),
            config["in_channels"],
            config["latent_channels"],
            2 ** (len(config["block_out_channels"]) - 1),
            float(config.get("scaling_factor", _OLD_SCALING_FACTOR)),
            float(config.get("shift_factor") or 0.0),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not the folder of an AutoencoderKL: {error!r}") from error
    return found


def decoder_of(
    vae: dict[str, Any] | None, override: str = "", device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor] | None:
    """What makes images of a model's samples; ``None`` for a model of pixels.

    The VAE is loaded when the first latents are decoded.

    Args:
        vae: ``DatasetInfo.vae``, the fields of a ``VAEInfo``.
        override: where the VAE is now.
        device: where it runs.

    Returns:
        a function from latents to images, which raises ``ValueError`` without the VAE that the
        latents are from.
    """
    if vae is None:
        return None
    info = VAEInfo(**vae)

    def decode(latents: Tensor) -> Tensor:
        return _loaded(override or info.path, info.identity, str(device)).decode(latents)

    return decode


def why_no_vae(vae: dict[str, Any] | None, override: str = "") -> str | None:
    """Why latents cannot be decoded here; ``None`` when they can, or where there are none."""
    if vae is None:
        return None
    path = override or vae["path"]
    try:
        _require_identity(path, describe_vae(path), vae["identity"])
    except ValueError as error:
        return str(error)
    return None


@lru_cache(maxsize=2)
def _loaded(path: str, identity: str, device: str) -> VAE:
    vae = VAE(path, device)
    _require_identity(path, vae.info, identity)
    return vae


def _require_identity(path: str, found: VAEInfo, identity: str) -> None:
    if found.identity != identity:
        raise ValueError(
            f"the VAE {path} has the SHA-256 {found.identity[:16]}..., the latents were made "
            f"with {identity[:16]}...; set data.vae (--vae) to the folder of that one."
        )


def _folder_of(path: str) -> Path:
    try:
        folder = locate_model(path)
    except ValueError as error:
        raise ValueError(
            f"there is no VAE at {path!r} ({error}) Set data.vae (--vae) to its folder."
        ) from error
    inner = folder / "vae"
    return inner if inner.is_dir() and not (folder / "config.json").is_file() else folder
