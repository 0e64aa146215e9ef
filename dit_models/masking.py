"""Token masking for training (MaskDiT): the patches a step keeps, and the loss of the others."""

import torch
from torch import Tensor

from dit_models.config import MaskingConfig
from dit_models.diffusion.objective import image_mean
from dit_models.embeddings import grid_of, unpatchify
from dit_models.model_config import ModelConfig


def check_masking(masking: MaskingConfig, model: ModelConfig) -> None:
    """Refuse settings that have no effect together.

    Raises:
        ValueError: names both settings.
    """
    depth = model.mask_decoder_depth
    if not masking.ratio and depth:
        raise ValueError(
            f"mask_decoder_depth={depth} has no effect with masking.ratio=0; set masking.ratio "
            "(MaskDiT and EC-DiT: 0.5), or leave the decoder out."
        )
    if masking.reconstruction and not depth:
        raise ValueError(
            f"masking.reconstruction={masking.reconstruction} needs blocks that see the hidden "
            "patches; set model_options.mask_decoder_depth, or leave it at 0."
        )
    if masking.ratio and kept_count(model.seq_len, masking.ratio) == model.seq_len:
        raise ValueError(
            f"masking.ratio={masking.ratio} hides none of the {model.seq_len} patches of an image; "
            "expected 0, or enough for one patch."
        )


def kept_count(seq_len: int, ratio: float) -> int:
    """Tokens that stay of ``seq_len``: ``max(1, round(seq_len * (1 - ratio)))``."""
    return max(1, round(seq_len * (1 - ratio)))


def draw_kept_tokens(
    batch_size: int, seq_len: int, ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Random tokens to keep, as many in every image, so that shapes are static.

    Source: MaskDiT (arXiv 2306.09305, section 3.2): uniform without replacement, each image for
    itself.

    Args:
        batch_size: images B.
        seq_len: tokens S of an image.
        ratio: share of hidden tokens, in [0, 1).
        generator: source of randomness, on the CPU.

    Returns:
        (B, ``kept_count(S, ratio)``) int64 token indices on the CPU, ascending in each row.

    Raises:
        ValueError: ``ratio`` out of range.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"the masking ratio is {ratio}; expected at least 0 and below 1.")
    order = torch.rand(batch_size, seq_len, generator=generator).argsort(dim=1, stable=True)
    return order[:, : kept_count(seq_len, ratio)].sort(dim=1).values


def gather_tokens(x: Tensor, kept_tokens: Tensor) -> Tensor:
    """x (B, S, D) at kept_tokens (B, K) int64, (B, K, D)."""
    return x.gather(1, _expanded(kept_tokens, x.shape[2]))


def scatter_tokens(x: Tensor, kept_tokens: Tensor, rest: Tensor) -> Tensor:
    """``rest`` (B, S, D) with x (B, K, D) in the places kept_tokens (B, K)."""
    return rest.to(x.dtype).scatter(1, _expanded(kept_tokens, x.shape[2]), x)


def kept_pixels(kept_tokens: Tensor, images: Tensor, patch_size: int) -> Tensor:
    """(B, 1, H, W): 1 in the patches kept_tokens (B, K) int64 of images (B, C, H, W), else 0."""
    rows, columns = grid_of(images.shape[2], images.shape[3], patch_size)
    kept = images.new_zeros(images.shape[0], rows * columns).scatter(1, kept_tokens, 1.0)
    patches = kept[:, :, None].expand(-1, -1, patch_size**2)
    return unpatchify(patches, rows, columns, patch_size)


def reconstruction_loss(prediction: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """(B,) mean of (prediction - target)^2 over the hidden patches of each image.

    Source: the MAE term of MaskDiT (arXiv 2306.09305, section 3.4), whose target is the noisy
    image; the coefficient there is 0.1.

    Args:
        prediction: (B, C', H, W) of the model, C' >= C; its first C channels are read.
        target: (B, C, H, W): the noisy image, or the clean one.
        kept: (B, 1, H, W) from ``kept_pixels``.
    """
    error = prediction[:, : target.shape[1]].to(target.dtype) - target
    return image_mean(error.square(), 1 - kept)


def _expanded(kept_tokens: Tensor, hidden_size: int) -> Tensor:
    return kept_tokens[:, :, None].expand(-1, -1, hidden_size)
