"""What a model costs: parameters, activated parameters, multiply-accumulates, memory."""

from dataclasses import dataclass
from fractions import Fraction

import moe_kernels as mk
from dit_models.backbone import DiT
from dit_models.embeddings import NUM_FREQUENCIES, grid_of
from dit_models.model_config import ModelConfig

DEFAULT_TEXT_LEN = 77  # context of CLIP-type text encoders
# fp32 weight, gradient and two AdamW moments, 4 bytes each
TRAINING_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class ModelCount:
    """Costs of one model.

    Attributes:
        trainable: parameters that training changes.
        frozen: values of the fixed position table that is added to the patches.
        total: their sum, as the papers count.
        activated: total minus the experts that a token does not use. Token choice uses K of E;
            expert choice ``capacity_factor`` of E on average, as the capacity would be unrounded
            (with schedules: in the last stage, at the mean over the noise levels).
        macs: multiply-accumulates of all matrix products for one image, without the attention's
            score and value products: what the DiT-MoE paper prints as Gflops.
        macs_with_attention: the same with those products.
        fp32_bytes, bf16_bytes: memory of ``total``.
        training_bytes: 16 bytes for each trainable parameter, without activations.
    """

    trainable: int
    frozen: int
    total: int
    activated: int
    macs: int
    macs_with_attention: int

    @property
    def fp32_bytes(self) -> int:
        """4 bytes a parameter."""
        return 4 * self.total

    @property
    def bf16_bytes(self) -> int:
        """2 bytes a parameter."""
        return 2 * self.total

    @property
    def training_bytes(self) -> int:
        """Weights, gradients and AdamW moments in fp32."""
        return TRAINING_BYTES_PER_PARAMETER * self.trainable


def count_model(model: DiT, text_len: int = DEFAULT_TEXT_LEN) -> ModelCount:
    """Count a built model (the meta device is enough) for one image of ``config.image_size``."""
    config = model.config
    trainable = sum(parameter.numel() for parameter in model.parameters())
    frozen = 0 if model.pos_embed is None else model.pos_embed.numel()
    total = trainable + frozen
    size = config.image_size
    return ModelCount(
        trainable=trainable,
        frozen=frozen,
        total=total,
        activated=total - round(unused_expert_parameters(model)),
        macs=count_macs(config, size, size, text_len=text_len),
        macs_with_attention=count_macs(config, size, size, text_len=text_len, attention=True),
    )


def unused_expert_parameters(model: DiT) -> Fraction:
    """Parameters of the experts that one token does not use, over all layers."""
    config = model.config
    unused = Fraction(0)
    for moe_layer, index in enumerate(config.moe_blocks):
        options = config.own_routing_options
        used = config.routing_idea.experts_per_token(config, options, moe_layer)
        moe = model.blocks[index].ffn
        assert isinstance(moe, mk.MoE)
        held = sum(parameter.numel() for parameter in moe.experts.parameters())
        unused += Fraction(held, config.num_experts) * (config.num_experts - used)
    return unused


def count_macs(
    config: ModelConfig,
    height: int,
    width: int,
    *,
    text_len: int = DEFAULT_TEXT_LEN,
    attention: bool = False,
) -> int:
    """Multiply-accumulates of the forward pass for one image.

    Args:
        config: shape of the model.
        height, width: of the latents; multiples of the patch size.
        text_len: text tokens L that the cross-attention reads.
        attention: also count the score and value products, 2 S^2 D a block (2 S L D for text).

    Raises:
        ValueError: the image does not divide into patches.
    """
    size = config.hidden_size
    rows, columns = grid_of(height, width, config.patch_size)
    seq_len = rows * columns
    kv_size = 2 * config.kv_heads * (size // config.num_heads)

    per_image = NUM_FREQUENCIES * size + size * size + 2 * size * size
    per_image += config.text_dim * size
    per_image += config.depth * 6 * size * size
    per_token = config.patch_size**2 * (config.in_channels + config.out_channels) * size
    per_token += config.depth * (2 * size + kv_size) * size
    total = per_image + seq_len * per_token
    if config.text_dim:
        total += config.depth * (seq_len * 2 * size * size + text_len * config.text_dim * kv_size)
    if attention:
        keys = seq_len + (text_len if config.text_dim else 0)
        total += config.depth * 2 * seq_len * keys * size
    dense_blocks = config.depth - len(config.moe_blocks)
    dense_matrices = 3 if config.mlp_activation == "swiglu" else 2
    total += dense_blocks * seq_len * dense_matrices * size * config.intermediate_size
    for moe_layer in range(len(config.moe_blocks)):
        total += _moe_macs(config, moe_layer, seq_len)
    return total


def _moe_macs(config: ModelConfig, moe_layer: int, seq_len: int) -> int:
    """Of one MoE layer."""
    routing, options = config.routing_idea, config.own_routing_options
    size = config.hidden_size
    matrices = 3 if config.expert_activation == "swiglu" else 2
    expert_rows = routing.rows_per_image(config, options, moe_layer, seq_len)
    router = routing.router_macs(config, seq_len)
    experts = expert_rows * matrices * size * config.expert_intermediate_size
    shared = seq_len * matrices * size * config.shared_intermediate_size
    return router + experts + shared
