"""The one transformer of all three families; a family only fills the FFN slot of its blocks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moe_kernels as mk
from dit_models.block import BlockInput, DiTBlock, FinalLayer
from dit_models.embeddings import (
    LabelEmbedder,
    PatchEmbedder,
    PooledTextEmbedder,
    TimestepEmbedder,
    grid_of,
    sincos_positions,
    unpatchify,
)
from dit_models.initialization import EMBEDDING_STD
from dit_models.masking import gather_tokens, scatter_tokens
from dit_models.model_config import ModelConfig
from dit_models.outputs import DiTOutput
from dit_models.rope import Rotation, rotation_of_grid
from dit_models.routing import LayerRouting
from dit_models.routing.layers import joined


class DiT(nn.Module):
    """Diffusion transformer over latents, with classes, text, both or neither.

    Args:
        config: shape of the model.
        ffn: ``ffn(block_index)`` makes the FFN of block ``block_index`` (from 0), on ``device``
            and in ``dtype``.
        on_block: called with each block as soon as it is made, e.g. to divide it among processes
            before the next one takes memory.
        device, dtype: where the parameters are made; "meta" takes no memory.

    Attributes:
        config: the ``ModelConfig``.
        gradient_checkpointing: in training, recompute each block in the backward pass; the
            routing decisions are saved, not recomputed.
    """

    pos_embed: Tensor | None
    mask_token: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        ffn: Callable[[int], nn.Module],
        *,
        on_block: Callable[[nn.Module], None] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self._reads_noise_levels = config.reads_noise_levels
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        size = config.hidden_size
        self.x_embedder = PatchEmbedder(config.in_channels, size, config.patch_size, **factory)
        self.t_embedder = TimestepEmbedder(
            size, config.time_scale, config.time_frequency_shift, **factory
        )
        self.y_embedder = (
            LabelEmbedder(config.num_classes, size, **factory) if config.num_classes else None
        )
        self.text_embedder = (
            PooledTextEmbedder(config.text_dim, size, **factory) if config.text_dim else None
        )
        positions = None
        if config.positions != "rope":
            side = config.image_size // config.patch_size
            positions = sincos_positions(size, side, side, **factory)
        self.register_buffer("pos_embed", positions, persistent=False)
        self.register_parameter("mask_token", None)
        if config.mask_decoder_depth:
            self.mask_token = nn.Parameter(torch.empty(size, **factory))
            self._reset_mask_token()
        self.blocks = nn.ModuleList()
        for index in range(config.depth):
            block = DiTBlock(
                size,
                config.num_heads,
                config.num_kv_heads,
                ffn=ffn(index),
                text_dim=config.text_dim,
                qkv_bias=config.qkv_bias,
                qk_norm=config.qk_norm,
                qk_norm_kind=config.qk_norm_kind,
                **factory,
            )
            self.blocks.append(block)
            if on_block is not None:
                on_block(block)
        self.final_layer = FinalLayer(size, config.patch_size, config.out_channels, **factory)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        kept_tokens: Tensor | None = None,
    ) -> DiTOutput:
        """Predict from noisy latents.

        Args:
            latents: (B, C, H, W) floating point; H and W are any multiples of the patch size.
            timesteps: (B,) floating point, in the unit that ``config.time_scale`` is for.
            labels: (B,) int64, for a model with classes; ``config.num_classes`` = no class.
            text: (B, L, text_dim) floating point, for a model with text.
            text_mask: (B, L) bool, True where ``text`` holds a token; ``None`` = everywhere.
            kept_tokens: (B, K) int64, for masked training (``masking.draw_kept_tokens``): the
                tokens that the blocks see. With ``config.mask_decoder_depth`` the last blocks see
                all of them, a mask token in the place of each hidden one; without it the sample is
                0 in the hidden patches. ``None`` = all.

        Returns:
            ``DiTOutput``: the sample (B, out_channels, H, W) in the dtype of ``latents`` and the
            plans of the MoE layers, in order.

        Raises:
            ValueError: a shape that does not fit, or a condition missing or not expected.
        """
        self._check(latents, timesteps, labels, text, text_mask, kept_tokens)
        rows, columns = grid_of(latents.shape[2], latents.shape[3], self.config.patch_size)
        dtype = self.x_embedder.proj.weight.dtype
        if text is not None:
            text = text.to(dtype)
            if text_mask is not None:
                # Whatever the padding holds: an attention weight of 0 times NaN would spread.
                text = torch.where(text_mask[:, :, None], text, torch.zeros_like(text))
        timestep_embedding = self.t_embedder(timesteps)
        conditioning = self._conditioning(timestep_embedding, labels, text, text_mask)
        rotation = self._rotation(rows, columns, latents.device)
        context = BlockInput(
            conditioning,
            text,
            text_mask,
            rotation,
            timestep_embedding,
            self._noise_levels(timesteps),
        )

        x = self.x_embedder(latents.to(dtype))
        positions = self._positions(rows, columns)
        if positions is not None:
            x = x + positions
        if kept_tokens is not None:
            x = gather_tokens(x, kept_tokens)
            if rotation is not None:
                context = context._replace(rotation=rotation.select(kept_tokens))
        decoder_start = len(self.blocks) - self.config.mask_decoder_depth
        routings = []
        for index, block in enumerate(self.blocks):
            if kept_tokens is not None and index == decoder_start:
                x = self._with_mask_tokens(x, kept_tokens, positions, rows * columns)
                context = context._replace(rotation=rotation)
            x, routing = self._run_block(block, x, context)
            if routing is not None:
                routings.append(routing)
        patches = self.final_layer(x, conditioning)
        if kept_tokens is not None and not self.config.mask_decoder_depth:
            hidden = patches.new_zeros(patches.shape[0], rows * columns, patches.shape[2])
            patches = scatter_tokens(patches, kept_tokens, hidden)
        sample = unpatchify(patches, rows, columns, self.config.patch_size)
        return DiTOutput(sample.to(latents.dtype), **joined(routings))

    def reset_parameters(self) -> None:
        """Initialise everything again, the FFN slots and the positions included.

        Xavier uniform on Linear layers with zero biases, normal 0.02 on the timestep MLP and the
        label table, zeros on adaLN, the cross-attention's output and the final layer: a new model
        predicts exactly 0.
        """
        for module in self.children():
            for part in module if isinstance(module, nn.ModuleList) else [module]:
                part.reset_parameters()  # type: ignore[operator]
        if self.mask_token is not None:
            self._reset_mask_token()
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute the stored positions again (they are in no checkpoint)."""
        if self.pos_embed is None:
            return
        side = self.config.image_size // self.config.patch_size
        positions = sincos_positions(
            self.config.hidden_size, side, side, dtype=self.pos_embed.dtype
        )
        self.pos_embed.copy_(positions)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> "DiT":
        """As ``nn.Module.to_empty``, but with valid positions, which no checkpoint restores."""
        super().to_empty(device=device, recurse=recurse)
        self.reset_buffers()
        return self

    def _run_block(
        self, block: nn.Module, x: Tensor, context: BlockInput
    ) -> tuple[Tensor, LayerRouting | None]:
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return block(x, context)
        return checkpoint(
            block, x, context, use_reentrant=False, context_fn=mk.save_routing_context_fn
        )

    def _noise_levels(self, timesteps: Tensor) -> tuple[float, ...] | None:
        """Noise levels on the host, where the routing makes capacities of them: waits for them."""
        if not self._reads_noise_levels:
            return None
        largest = self.config.max_timestep
        # 0.2 in fp32 is 0.2000000030, which could be a token more or less than 0.2 gives.
        return tuple(round(timestep / largest, 6) for timestep in timesteps.tolist())

    def _conditioning(
        self, timestep: Tensor, labels: Tensor | None, text: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """(B, D): the sum of the embedded timestep, label and pooled text."""
        conditioning = timestep
        if self.y_embedder is not None:
            conditioning = conditioning + self.y_embedder(labels)
        if self.text_embedder is not None:
            conditioning = conditioning + self.text_embedder(text, mask)
        return conditioning

    def _reset_mask_token(self) -> None:
        assert self.mask_token is not None
        nn.init.normal_(self.mask_token, std=EMBEDDING_STD)

    def _with_mask_tokens(
        self, x: Tensor, kept_tokens: Tensor, positions: Tensor | None, seq_len: int
    ) -> Tensor:
        """x (B, K, D) in its places among mask tokens with their positions, (B, S, D)."""
        assert self.mask_token is not None
        hidden = self.mask_token if positions is None else self.mask_token + positions
        return scatter_tokens(x, kept_tokens, hidden.expand(x.shape[0], seq_len, -1))

    def _rotation(self, rows: int, columns: int, device: torch.device) -> Rotation | None:
        config = self.config
        if config.positions == "sincos":
            return None
        head_dim = config.hidden_size // config.num_heads
        return rotation_of_grid(rows, columns, head_dim, config.rope_theta, device)

    def _positions(self, rows: int, columns: int) -> Tensor | None:
        stored = self.pos_embed
        side = self.config.image_size // self.config.patch_size
        if stored is None or (rows, columns) == (side, side):
            return stored
        return sincos_positions(
            self.config.hidden_size, rows, columns, device=stored.device, dtype=stored.dtype
        )

    def _check(
        self,
        latents: Tensor,
        timesteps: Tensor,
        labels: Tensor | None,
        text: Tensor | None,
        text_mask: Tensor | None,
        kept_tokens: Tensor | None,
    ) -> None:
        config = self.config
        if latents.ndim != 4 or latents.shape[1] != config.in_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}: "
                f"expected (B, {config.in_channels}, H, W)"
            )
        batch_size = latents.shape[0]
        _check_condition("timesteps", timesteps, (batch_size,), True)
        _check_condition("labels", labels, (batch_size,), config.num_classes > 0)
        text_len = text.shape[1] if text is not None and text.ndim == 3 else -1
        _check_condition("text", text, (batch_size, text_len, config.text_dim), config.text_dim > 0)
        if text_mask is not None:
            _check_condition("text_mask", text_mask, (batch_size, text_len), text is not None)
            if text_mask.dtype != torch.bool:
                raise ValueError(f"text_mask has dtype {text_mask.dtype}: expected torch.bool")
        if kept_tokens is not None:
            seq_len = latents.shape[2] * latents.shape[3] // config.patch_size**2
            shape = tuple(kept_tokens.shape)
            if len(shape) != 2 or shape[0] != batch_size or not 1 <= shape[1] <= seq_len:
                raise ValueError(
                    f"kept_tokens has shape {shape}: expected ({batch_size}, 1 to {seq_len})"
                )
            if kept_tokens.dtype != torch.int64:
                raise ValueError(f"kept_tokens has dtype {kept_tokens.dtype}: expected torch.int64")


def _check_condition(
    name: str, value: Tensor | None, shape: tuple[int, ...], expected: bool
) -> None:
    if expected and value is None:
        raise ValueError(f"{name}=None: this model is conditioned on {name}, pass it")
    if not expected and value is not None:
        raise ValueError(f"{name} given to a model without it: pass None")
    if value is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {shape}")
