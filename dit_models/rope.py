"""Rotary positions in two dimensions: queries and keys are turned by their row and column."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of the angle of every token and channel pair, float32.

    Either (S, head_dim / 2), the same for all images, or (B, 1, S, head_dim / 2).
    """

    cos: Tensor
    sin: Tensor

    def select(self, kept_tokens: Tensor) -> "Rotation":
        """The rotations of kept_tokens (B, K) int64 of each image: (B, 1, K, head_dim / 2)."""
        return Rotation(self.cos[kept_tokens][:, None], self.sin[kept_tokens][:, None])


def rotation_of_grid(
    rows: int,
    columns: int,
    head_dim: int,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> Rotation:
    """Rotations of a grid of ``rows`` x ``columns`` tokens, row by row, each (S, head_dim / 2).

    Of the head_dim / 2 channel pairs the first half turns with the row, the second half with the
    column: pair i of a half by the angle p w_i with w_i = theta^(-i / (head_dim / 4)) and p the
    integer grid position. Angles are computed in float64.

    Source: RoFormer (arXiv 2104.09864, eq. 15) with each axis on its own channels, as
    arXiv 2403.13298 (section 3.1, "axial frequency").

    Args:
        rows, columns: of the grid.
        head_dim: channels of a head, a multiple of 4.
        theta: base of the frequencies.
        device: where the result goes.
    """
    quarter = head_dim // 4
    exponents = torch.arange(quarter, dtype=torch.float64, device=device) / quarter
    frequencies = theta**-exponents
    row = torch.arange(rows, dtype=torch.float64, device=device)[:, None] * frequencies
    column = torch.arange(columns, dtype=torch.float64, device=device)[:, None] * frequencies
    angles = torch.cat(
        [
            row[:, None, :].expand(-1, columns, -1),
            column[None, :, :].expand(rows, -1, -1),
        ],
        dim=2,
    ).flatten(0, 1)
    return Rotation(angles.cos().float(), angles.sin().float())


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turn each channel pair of heads (B, heads, S, head_dim) by its token's angle.

    Pair i is channel i as the real and channel i + head_dim / 2 as the imaginary part. Computed in
    float32 (float64 for float64 heads) and returned in the dtype of ``heads``.
    """
    real, imaginary = heads.chunk(2, dim=3)  # products with fp32 angles are in fp32
    cos, sin = rotation
    turned = [real * cos - imaginary * sin, real * sin + imaginary * cos]
    return torch.cat(turned, dim=3).to(heads.dtype)
