"""The transformer block with its FFN slot, and the final layer; both start with adaLN at zero."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit_models.attention import NORM_EPS, CrossAttention, SelfAttention
from dit_models.initialization import reset_layers, zero_linear
from dit_models.moe_ffn import RoutedFFN
from dit_models.rope import Rotation
from dit_models.routing import LayerRouting, RouterContext


class BlockInput(NamedTuple):
    """What every block reads beside the tokens."""

    conditioning: Tensor  # (B, D), before the SiLU of adaLN
    text: Tensor | None  # (B, L, text_dim), zeros at padding
    text_mask: Tensor | None  # (B, L) bool, True = a token
    rotation: Rotation | None = None  # of the tokens' positions, for queries and keys
    timestep_embedding: Tensor | None = None  # (B, D), for routers
    noise_levels: tuple[float, ...] | None = None  # for routers that ask for them


class DiTBlock(nn.Module):
    """Transformer block with adaLN-zero: self-attention, [text cross-attention,] FFN slot.

        x = x + g1 * attn(norm(x) * (1 + c1) + b1)
        x = x + cross_attn(norm(x), text)
        x = x + g2 * ffn(norm(x) * (1 + c2) + b2)

    with (b1, c1, g1, b2, c2, g2) = Linear(SiLU(conditioning)), zero at the start, as is the output
    of the cross-attention.

    Args:
        hidden_size: D.
        num_heads: query heads.
        num_kv_heads: key and value heads; ``None`` = ``num_heads``.
        ffn: module with ``ffn(x (B, S, D)) -> (out (B, S, D), RoutingPlan or None)``, or a
            ``RoutedFFN``; it initialises itself, and again in its ``reset_parameters()``.
        text_dim: width of the text features; 0 leaves the cross-attention out.
        qkv_bias: biases in the query, key and value projections.
        qk_norm, qk_norm_kind: see ``SelfAttention``.

    Source: DiT (adaLN-zero); EC-DiT (arXiv 2410.02098) for the place of the cross-attention.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        ffn: nn.Module,
        text_dim: int = 0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        qk_norm_kind: str = "layer_norm",
        **factory: Any,
    ) -> None:
        super().__init__()
        self.norm1 = _norm(hidden_size, factory)
        self.attn = SelfAttention(
            hidden_size,
            num_heads,
            num_kv_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            qk_norm_kind=qk_norm_kind,
            **factory,
        )
        self.cross_attn: CrossAttention | None = None
        if text_dim:
            self.norm_cross = _norm(hidden_size, factory)
            self.cross_attn = CrossAttention(
                hidden_size, text_dim, num_heads, num_kv_heads, qkv_bias=qkv_bias, **factory
            )
        self.norm2 = _norm(hidden_size, factory)
        self.ffn = ffn
        self.adaLN_modulation = _adaln(hidden_size, 6, factory)
        self._reset_outside_ffn()

    def forward(self, x: Tensor, context: BlockInput) -> tuple[Tensor, LayerRouting | None]:
        """x (B, S, D) -> the same shape, and the routing of a MoE slot."""
        modulation = self.adaLN_modulation(context.conditioning)[:, None, :].chunk(6, dim=2)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        attended = self.attn(_modulate(self.norm1(x), shift1, scale1), rotation=context.rotation)
        x = torch.addcmul(x, gate1, attended)
        if self.cross_attn is not None:
            assert context.text is not None
            x = x + self.cross_attn(self.norm_cross(x), context.text, context.text_mask)
        out, routing = self._feed_forward(self.norm2(x), shift2, scale2, context)
        return torch.addcmul(x, gate2, out), routing

    def _feed_forward(
        self, unmodulated: Tensor, shift: Tensor, scale: Tensor, context: BlockInput
    ) -> tuple[Tensor, LayerRouting | None]:
        """The FFN slot."""
        x = _modulate(unmodulated, shift, scale)
        if not isinstance(self.ffn, RoutedFFN):
            out, plan = self.ffn(x)
            return out, None if plan is None else LayerRouting(plan)
        assert context.timestep_embedding is not None
        router_context = RouterContext(
            unmodulated, context.timestep_embedding, context.conditioning, context.noise_levels
        )
        return self.ffn(x, router_context)

    def reset_parameters(self) -> None:
        """Xavier-uniform Linear layers; adaLN and the cross-attention's output at zero."""
        self._reset_outside_ffn()
        self.ffn.reset_parameters()  # type: ignore[operator]

    def _reset_outside_ffn(self) -> None:
        reset_layers(self.attn)
        if self.cross_attn is not None:
            reset_layers(self.cross_attn)
            zero_linear(self.cross_attn.proj)
        zero_linear(_adaln_linear(self.adaLN_modulation))


class FinalLayer(nn.Module):
    """adaLN and the linear map to patches, both zero at the start, (B, S, D) -> (B, S, p*p*C)."""

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, **factory: Any
    ) -> None:
        super().__init__()
        self.norm_final = _norm(hidden_size, factory)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels, **factory)
        self.adaLN_modulation = _adaln(hidden_size, 2, factory)
        self.reset_parameters()

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """x (B, S, D), conditioning (B, D) -> patches whose inner order is (row, column, C)."""
        shift, scale = self.adaLN_modulation(conditioning)[:, None, :].chunk(2, dim=2)
        return self.linear(_modulate(self.norm_final(x), shift, scale))

    def reset_parameters(self) -> None:
        """All zeros: a new model predicts exactly 0."""
        zero_linear(self.linear)
        zero_linear(_adaln_linear(self.adaLN_modulation))


def _norm(hidden_size: int, factory: dict[str, Any]) -> nn.LayerNorm:
    return nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False, **factory)


def _adaln(hidden_size: int, parts: int, factory: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size, **factory))


def _adaln_linear(modulation: nn.Sequential) -> nn.Linear:
    linear = modulation[1]
    assert isinstance(linear, nn.Linear)
    return linear


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    # In one pass: a product of its own would be another tensor of this size, written and read.
    return torch.addcmul(shift, x, 1 + scale)
