"""Patches, positions, timesteps, labels and pooled text as vectors of the hidden size."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dit_models.initialization import EMBEDDING_STD, reset_layers

NUM_FREQUENCIES = 256


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into flattened patches: (B, C, H, W) -> (B, H/p * W/p, C * p * p).

    Patches run row by row; inside one the order is (channel, row, column), that of the weight of
    a strided convolution.

    Raises:
        ValueError: H or W is not a multiple of ``patch_size``.
    """
    batch_size, channels, height, width = images.shape
    rows, columns = grid_of(height, width, patch_size)
    patches = images.reshape(batch_size, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, rows: int, columns: int, patch_size: int) -> Tensor:
    """Put patches together: (B, rows * columns, p * p * C) -> (B, C, rows * p, columns * p).

    Inside a patch the order is (row, column, channel): the output layer of DiT checkpoints.
    """
    grid = patches.unflatten(1, (rows, columns)).unflatten(3, (patch_size, patch_size, -1))
    shape = (grid.shape[0], grid.shape[5], rows * patch_size, columns * patch_size)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(shape)


def grid_of(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of ``height`` x ``width`` latent pixels.

    Raises:
        ValueError: a side is not a positive multiple of ``patch_size``.
    """
    if height % patch_size or width % patch_size or height == 0 or width == 0:
        raise ValueError(
            f"image of {height} x {width} does not divide into patches of {patch_size}: "
            f"expected positive multiples of {patch_size}; crop or pad it first"
        )
    return height // patch_size, width // patch_size


def sincos_positions(
    hidden_size: int,
    rows: int,
    columns: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Fixed 2-D positions, (1, rows * columns, D), computed in float64.

    The first half of the channels encodes the column, the second the row; each half is
    [sin(p w_i), cos(p w_i)] with w_i = 10000^(-i / (D/4)) and p the integer grid position.

    Source: the DiT backbone that both papers build on.
    """
    quarter = hidden_size // 4
    exponents = torch.arange(quarter, dtype=torch.float64, device=device) / quarter
    omega = 10000.0**-exponents
    halves = []
    for size in (columns, rows):
        angles = torch.arange(size, dtype=torch.float64, device=device)[:, None] * omega
        halves.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    column_half = halves[0][None, :, :].expand(rows, -1, -1)
    row_half = halves[1][:, None, :].expand(-1, columns, -1)
    positions = torch.cat([column_half, row_half], dim=2).flatten(0, 1)[None]
    return positions.to(dtype or torch.get_default_dtype())


class PatchEmbedder(nn.Module):
    """Linear map of each flattened patch, (B, C, H, W) -> (B, S, D).

    Equal to a strided convolution: ``proj.weight`` (D, C * p * p) is its weight (D, C, p, p)
    reshaped.
    """

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int, **factory: Any) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_channels * patch_size**2, hidden_size, **factory)
        self.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, C, H, W) as tokens (B, S, D), row by row."""
        return self.proj(patchify(images, self.patch_size))

    def reset_parameters(self) -> None:
        """Xavier uniform over a flattened patch."""
        reset_layers(self)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep through Linear-SiLU-Linear, (B,) -> (B, D).

    [cos(t f_i), sin(t f_i)] with f_i = exp(-ln(10000) i / (128 - s)), i = 0..127,
    t = ``time_scale`` times the given timestep, and s = ``frequency_shift``.
    """

    def __init__(
        self,
        hidden_size: int,
        time_scale: float = 1.0,
        frequency_shift: int = 0,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(
            nn.Linear(NUM_FREQUENCIES, hidden_size, **factory),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size, **factory),
        )
        self.reset_parameters()

    def sinusoids(self, timesteps: Tensor) -> Tensor:
        """(B,) timesteps -> (B, 256) fp32."""
        half = NUM_FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        frequencies = torch.exp(steps * (-math.log(10000.0) / (half - self.frequency_shift)))
        angles = (timesteps.float() * self.time_scale)[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps (B,), kept in fp32 up to the first Linear, as (B, D)."""
        return self.mlp(self.sinusoids(timesteps).to(self._linears()[0].weight.dtype))

    def reset_parameters(self) -> None:
        """Normal 0.02 weights, zero biases."""
        for linear in self._linears():
            nn.init.normal_(linear.weight, std=EMBEDDING_STD)
            nn.init.zeros_(linear.bias)

    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self.mlp if isinstance(layer, nn.Linear)]


class LabelEmbedder(nn.Module):
    """Table of ``num_classes`` + 1 rows, (B,) int64 -> (B, D); the last row is "no class"."""

    def __init__(self, num_classes: int, hidden_size: int, **factory: Any) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size, **factory)
        self.reset_parameters()

    def forward(self, labels: Tensor) -> Tensor:
        """Look labels (B,) up."""
        return self.embedding_table(labels)

    def reset_parameters(self) -> None:
        """Normal 0.02."""
        nn.init.normal_(self.embedding_table.weight, std=EMBEDDING_STD)


class PooledTextEmbedder(nn.Module):
    """Linear map of the mean text feature over the tokens that are not padding."""

    def __init__(self, text_dim: int, hidden_size: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Linear(text_dim, hidden_size, **factory)
        self.reset_parameters()

    def forward(self, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """text (B, L, text_dim), zeros at padding, text_mask (B, L) bool, True = a token -> (B, D).

        A row of padding alone pools to zeros.
        """
        if text_mask is None:
            return self.proj(text.mean(dim=1))
        count = text_mask.sum(dim=1, keepdim=True).clamp(min=1)
        return self.proj(text.sum(dim=1) / count.to(text.dtype))

    def reset_parameters(self) -> None:
        """Xavier uniform."""
        reset_layers(self)
