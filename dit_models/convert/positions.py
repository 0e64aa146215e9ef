"""Stored positions: compared with ours when they come in, made again when they go out."""

import torch
from torch import Tensor

from dit_models.convert.layout import Piece, Tensors
from dit_models.embeddings import sincos_positions
from dit_models.model_config import ModelConfig

# Rounding to fp16 is 5e-4. Averaged weights of DiT's code average the constant positions, too, and
# drift by some roundings a step, in 1e-4 at most. Another convention differs by 1.
_TOLERANCE = 2e-3


def positions_of(config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """(1, S, D) as DiT's code makes them: computed in fp64, kept in fp32, saved in ``dtype``."""
    side = config.image_size // config.patch_size
    exact = sincos_positions(config.hidden_size, side, side, dtype=torch.float32)
    return exact.to(dtype)


def check_positions(
    tensors: Tensors, piece: Piece, config: ModelConfig, where: str
) -> tuple[Tensor | None, float]:
    """Compare stored positions with ours.

    Returns:
        The stored tensor where its bits differ from ours in the same dtype, else ``None``; and the
        largest difference.

    Raises:
        ValueError: they are not these positions.
    """
    stored = tensors[piece.name].read()
    ours = positions_of(config, stored.dtype)
    difference = float((stored.double() - ours.double()).abs().max())
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"{where}: {piece.name} differs from DiT's fixed 2-D sin-cos positions by up to "
            f"{difference:.3g}; expected at most {_TOLERANCE:g}. The model was trained with other "
            "positions, which this package does not have."
        )
    return (None if torch.equal(stored, ours) else stored), difference
