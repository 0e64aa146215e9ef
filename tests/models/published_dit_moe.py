"""A whole DiT-MoE, and the dense DiT that it comes from, with the key names of released weights.

Written from the papers' facts (tests/models/dit_moe.py says the same of the MoE block): strided
convolution for patches, one parameter of fixed positions, adaLN-zero blocks, a Python loop over the
experts, ``(row, column, channel)`` in a patch of the output. The attention has timm's names
(``qkv``, ``proj``: S and B, dense DiT) or those of a FlashAttention block (``Wqkv``, ``out_proj``,
``q_norm``, ``k_norm``: XL and G).

``build("DiT-MoE-S/2-8E2A")`` has random weights in every layer (fresh ones would predict 0);
``sample_flow`` and ``sample_ddpm`` are plain sampling loops with classifier-free guidance.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_models.model_config import ModelConfig
from dit_models.models import get_config

from .dit_moe import SparseMoeBlock

NORM_EPS = 1e-6


def build(model: str | ModelConfig, *, naming: str | None = None, seed: int = 0) -> "PublishedDiT":
    """A model of a preset's size, in evaluation mode, with random weights.

    ``naming`` is "timm" or "flash"; by default what the released weights of this size have.
    """
    config = get_config(model) if isinstance(model, str) else model
    naming = naming or ("flash" if config.qk_norm else "timm")
    built = PublishedDiT(config, naming)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name == "pos_embed":
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "_norm.weight" in name:
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim < 2:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    return built.eval().requires_grad_(False)


class PublishedDiT(nn.Module):
    """(B, C, H, W), (B,), (B,) -> (B, C_out, H, W)."""

    def __init__(self, config: ModelConfig, naming: str) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.out_channels, self.in_channels = config.out_channels, config.in_channels
        self.patch_size = patch
        self.x_embedder = PatchEmbed(config.in_channels, size, patch)
        self.t_embedder = TimestepEmbedder(size)
        self.y_embedder = LabelEmbedder(config.num_classes, size)
        side = config.image_size // patch
        positions = torch.from_numpy(positions_2d(size, side)).float()[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(config, naming) for _ in range(config.depth))
        self.final_layer = FinalLayer(size, patch, config.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)
        side, p = math.isqrt(x.shape[1]), self.patch_size
        x = x.reshape(x.shape[0], side, side, p, p, self.out_channels)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(x.shape[0], self.out_channels, side * p, side * p)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, scale: float, channels: int | None = None
    ) -> Tensor:
        """Guidance of a doubled batch whose second half has the null class.

        ``channels``: guide the first ones only (DDPM: 3); None: those of the image.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        count = self.in_channels if channels is None else channels
        guided, rest = out[:, :count], out[:, count:]
        conditional, unconditional = guided.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


class PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, size: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, size, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = t[:, None].float() * frequencies
        sinusoids = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
        return self.mlp(sinusoids.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, naming: str) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.names = ("qkv", "proj") if naming == "timm" else ("Wqkv", "out_proj")
        setattr(self, self.names[0], nn.Linear(size, 3 * size))
        setattr(self, self.names[1], nn.Linear(size, size))
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nn.LayerNorm(size // config.num_heads, eps=NORM_EPS)
            self.k_norm = nn.LayerNorm(size // config.num_heads, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, size = x.shape
        fused = getattr(self, self.names[0])(x)
        q, k, v = fused.view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v)
        return getattr(self, self.names[1])(x.transpose(1, 2).reshape(batch, tokens, size))


class Mlp(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, width)
        self.fc2 = nn.Linear(width, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, naming: str) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm1 = nn.LayerNorm(size, elementwise_affine=False, eps=NORM_EPS)
        self.attn = Attention(config, naming)
        self.norm2 = nn.LayerNorm(size, elementwise_affine=False, eps=NORM_EPS)
        if config.family == "dit":
            self.mlp = Mlp(size, config.intermediate_size)
        else:
            self.moe = SparseMoeBlock(
                size,
                int(config.mlp_ratio),
                config.num_experts,
                config.top_k,
                int(config.shared_ratio) or None,
            )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        ffn = self.mlp if hasattr(self, "mlp") else self.moe
        return x + gate2[:, None] * ffn(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, size: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(size, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(size, patch * patch * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def positions_2d(size: int, side: int) -> np.ndarray:
    """(side², size): the column in the first half of the channels, the row in the second."""
    column, row = np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32))
    return np.concatenate([_positions_1d(size // 2, axis) for axis in (column, row)], axis=1)


def _positions_1d(size: int, places: np.ndarray) -> np.ndarray:
    omega = 1.0 / 10000 ** (np.arange(size // 2, dtype=np.float64) / (size / 2.0))
    angles = np.outer(places.reshape(-1), omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


@torch.no_grad()
def sample_flow(
    model: PublishedDiT, noise: Tensor, labels: Tensor, steps: int, scale: float
) -> Tensor:
    """Euler steps from t = 1 to 0 on the velocity, guided in all channels of the image."""
    x = torch.cat([noise, noise])
    null = torch.full_like(labels, model.y_embedder.embedding_table.num_embeddings - 1)
    y = torch.cat([labels, null])
    for step in range(steps, 0, -1):
        t = torch.full((len(x),), step / steps)
        velocity = model.forward_with_cfg(x, t, y, scale)[:, : model.in_channels]
        x = x - velocity / steps
    return x[: len(noise)]


@torch.no_grad()
def sample_ddpm(
    model: PublishedDiT,
    noise: Tensor,
    labels: Tensor,
    timesteps: list[int],
    scale: float,
    step_noise: list[Tensor],
) -> Tensor:
    """Ancestral steps over ``timesteps`` (falling) with a learned variance, 3 guided channels.

    ``step_noise``: a (B, C, H, W) for each step but the last.
    """
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), dim=0)
    x = torch.cat([noise, noise]).double()
    null = torch.full_like(labels, model.y_embedder.embedding_table.num_embeddings - 1)
    y = torch.cat([labels, null])
    for index, timestep in enumerate(timesteps):
        t = torch.full((len(x),), float(timestep))
        out = model.forward_with_cfg(x.to(noise.dtype), t, y, scale, channels=3).double()
        predicted_noise, raw = out.chunk(2, dim=1)
        last = index + 1 == len(timesteps)
        now = alpha_bar[timestep]
        before = torch.tensor(1.0, dtype=torch.float64) if last else alpha_bar[timesteps[index + 1]]
        beta = 1 - now / before
        data = (x - (1 - now).sqrt() * predicted_noise) / now.sqrt()
        mean = before.sqrt() * beta / (1 - now) * data
        mean = mean + (now / before).sqrt() * (1 - before) / (1 - now) * x
        if last:
            x = mean
            continue
        lowest = (beta * (1 - before) / (1 - now)).log()
        share = (raw + 1) / 2
        deviation = (0.5 * (share * beta.log() + (1 - share) * lowest)).exp()
        x = mean + deviation * torch.cat([step_noise[index]] * 2).double()
    return x[: len(noise)].to(noise.dtype)
