"""What autograd keeps of a forward pass, tensor by tensor, in eager mode.

The lists follow ``block.py``, ``attention.py`` and the saved tensors of the ops of ``moe_kernels``.
With "bf16" they are those under CUDA's autocast: norms and the sums of the residual stream in fp32,
products in bf16, and a copy wherever the two meet. T = B·S tokens, R expert rows, widths as in the
model.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import moe_kernels as mk
from dit_models.model_config import ModelConfig
from dit_models.plan.settings import Run
from dit_models.plan.units import FP32

INT32 = 4


@dataclass(frozen=True)
class Widths:
    """Sizes of one forward pass on one process.

    Attributes:
        run: what is trained.
        expert: ranks that share the experts of a layer.
    """

    run: Run
    expert: int = 1

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.run.model

    @property
    def images(self) -> int:
        """B."""
        return self.run.images_per_gpu

    @cached_property
    def tokens(self) -> int:
        """T."""
        return self.images * self.config.seq_len

    @cached_property
    def kv_size(self) -> int:
        """Width of all keys."""
        return self.config.kv_heads * (self.config.hidden_size // self.config.num_heads)

    @property
    def casts(self) -> bool:
        """Whether products read copies in another dtype."""
        return self.run.product_bytes != FP32

    def rows(self, moe_layer: int) -> int:
        """R of a layer: rows that the tokens of this process give."""
        return self.images * _rows_per_image(self.config, moe_layer)

    def arriving(self, moe_layer: int) -> int:
        """Rows that this process's experts get."""
        rows = self.rows(moe_layer)
        return rows if self.expert == 1 else round(rows * self.run.imbalance)


@lru_cache(maxsize=1024)
def _rows_per_image(config: ModelConfig, moe_layer: int) -> int:
    options = config.own_routing_options
    if config.routing_idea.name == "expert_choice":
        capacity = mk.expert_capacity(
            config.seq_len,
            config.num_experts,
            float(config.routing_idea.experts_per_token(config, options, moe_layer)),
            rounding=config.rounding,
            multiple_of=config.capacity_multiple_of,
        )
        return config.num_experts * capacity
    return config.routing_idea.rows_per_image(config, options, moe_layer, config.seq_len)


@dataclass(frozen=True)
class BlockActivations:
    """Bytes that one block leaves to its backward.

    Attributes:
        attention: up to the FFN slot, the block's input included.
        ffn: of the FFN slot with its norm.
        input: the block's input alone, which is all that is kept with ``recompute``, beside
        routing: the routing decisions.
        ffn_backward: what the backward of the FFN slot allocates beyond that, weight gradients
            not included.
    """

    attention: int
    ffn: int
    input: int
    routing: int
    ffn_backward: int

    @property
    def saved(self) -> int:
        """All of it."""
        return self.attention + self.ffn

    def kept(self, recompute: bool) -> int:
        """From the forward to the block's own backward."""
        return self.input + self.routing if recompute else self.saved


@lru_cache(maxsize=64)
def model_activations(widths: Widths) -> tuple[BlockActivations, ...]:
    """What each block keeps."""
    return tuple(block_activations(widths, index) for index in range(widths.config.depth))


def block_activations(widths: Widths, index: int) -> BlockActivations:
    """What block ``index`` keeps."""
    config = widths.config
    stream = widths.tokens * config.hidden_size * FP32
    attention = sum(_modulation(widths)) + sum(_attention(widths))
    if config.text_dim:
        attention += sum(_cross_attention(widths))
    norm = stream + 2 * widths.tokens * FP32 + stream  # input, mean and 1/std, normalised
    out = stream  # the gate's factor
    if index in config.moe_blocks:
        layer = config.moe_blocks.index(index)
        routing = sum(_routing(widths, layer))
        logits = widths.tokens * config.num_experts * FP32
        ffn = norm + logits + routing + sum(_experts(widths, layer)) + out
        backward = _experts_backward(widths, layer)
    else:
        routing = 0
        ffn = norm + sum(_dense(widths)) + out
        backward = _dense_backward(widths)
    return BlockActivations(attention, ffn, stream, routing, backward)


def rest_activations(widths: Widths) -> int:
    """What embeddings, final layer and loss keep."""
    config, tokens, images = widths.config, widths.tokens, widths.images
    size, product = config.hidden_size, widths.run.product_bytes
    pixels = images * config.image_size**2
    # patches, final norm (input, statistics, normalised), its modulated copy
    total = tokens * config.patch_size**2 * config.in_channels * product
    total += tokens * (2 * size * FP32 + 2 * FP32 + size * product)
    # noisy latents, noise, target; sample and its gradient and difference
    total += pixels * (3 * config.in_channels + 3 * config.out_channels) * FP32
    if config.text_dim:
        total += 2 * images * widths.run.text_len * config.text_dim * FP32  # given, and masked
    return total


def _modulation(widths: Widths) -> list[int]:
    size, product = widths.images * widths.config.hidden_size, widths.run.product_bytes
    activated, factors, scales = size * product, 6 * size * product, 2 * size * FP32
    gates = 2 * size * FP32 if widths.casts else 0
    return [activated, factors, scales, gates]


def _attention(widths: Widths) -> list[int]:
    config, tokens, product = widths.config, widths.tokens, widths.run.product_bytes
    size, kv_size = config.hidden_size, widths.kv_size
    kept = [
        tokens * size * FP32,  # block input
        2 * tokens * FP32,
        tokens * size * FP32,  # normalised
        tokens * size * product,  # modulated
        tokens * (size + 2 * kv_size) * product,  # queries, keys, values
        tokens * size * product,  # attended
        tokens * config.num_heads * FP32,  # logsumexp
        tokens * size * FP32,  # the gate's factor
    ]
    if config.qk_norm:
        rms = config.qk_norm_kind == "rms_norm"
        kept.append((1 if rms else 2) * tokens * (config.num_heads + config.kv_heads) * FP32)
        if widths.casts or (rms and widths.run.device == "cpu"):  # fp32 copy; x / rms(x)
            kept.append(tokens * (size + kv_size) * FP32)
    if config.qk_norm or config.positions != "sincos":
        kept.append(tokens * (size + kv_size) * product)
        kept.append(tokens * size * product)  # attended, which then comes out by heads
    return kept


def _cross_attention(widths: Widths) -> list[int]:
    config, tokens, product = widths.config, widths.tokens, widths.run.product_bytes
    text = widths.images * widths.run.text_len
    grouped = config.kv_heads < config.num_heads  # then keys and values are repeated
    keys = config.hidden_size if grouped else widths.kv_size
    kept = [
        tokens * config.hidden_size * FP32,  # norm's input
        2 * tokens * FP32,
        tokens * config.hidden_size * product,  # normalised
        tokens * config.hidden_size * product,  # queries
        2 * text * keys * product,
        2 * tokens * config.hidden_size * product,  # attended, and where there is text
        tokens * config.num_heads * FP32,
        text * FP32,  # mask
    ]
    if widths.casts:
        kept.append(text * config.text_dim * product)
    return kept


def _dense(widths: Widths) -> list[int]:
    config = widths.config
    into = _columns(config.mlp_activation, config.intermediate_size)
    widest = config.hidden_size + into + config.intermediate_size
    return [widths.tokens * widest * widths.run.product_bytes]


def _dense_backward(widths: Widths) -> int:
    """Of the output's gradient, the activation's and that of its input, the two largest at once."""
    config = widths.config
    inner, size = config.intermediate_size, config.hidden_size
    into = _columns(config.mlp_activation, inner)
    return widths.tokens * max(size + inner, into) * widths.run.product_bytes


def _routing(widths: Widths, layer: int) -> list[int]:
    """Weights, and the plan's indices as ``moe_kernels.ops.pack`` lays them out."""
    config, tokens, rows = widths.config, widths.tokens, widths.rows(layer)
    experts = config.num_experts
    indices = 3 * rows + tokens + 1 + 3 * experts + 2 + widths.images * experts
    return [rows * FP32, (indices + tokens * config.top_k) * INT32]


def _experts(widths: Widths, layer: int) -> list[int]:
    config, tokens, product = widths.config, widths.tokens, widths.run.product_bytes
    size, rows, arriving = config.hidden_size, widths.rows(layer), widths.arriving(layer)
    into = _columns(config.expert_activation, config.expert_intermediate_size)
    kept = [
        tokens * size * FP32,  # the router's input
        arriving * into * product,
    ]
    if widths.expert > 1:
        kept.append((arriving + rows) * size * product)  # that arrived, and that came back
        kept.append(arriving * (3 * INT32 + FP32))
    elif widths.casts:
        kept.append(tokens * size * product)
    if shared := config.shared_intermediate_size:
        kept.append(tokens * (_columns(config.expert_activation, shared) + shared) * product)
        if widths.casts:
            kept.append(tokens * size * product)
    return kept


def _experts_backward(widths: Widths, layer: int) -> int:
    config, tokens, rows = widths.config, widths.tokens, widths.arriving(layer)
    size, inner = config.hidden_size, config.expert_intermediate_size
    into = _columns(config.expert_activation, inner)
    read = tokens if widths.expert == 1 else rows  # what the rows were copied from
    if widths.run.device == "cpu":
        # gradient, input and output gradient of each row; activation and its gradient; h's; dx
        values = rows * (3 * size + 2 * inner + into) + read * size
    else:
        # h's gradient, with the activation or with the gradients of rows; or these summed
        values = max(rows * (into + max(inner, size)), rows * size + read * size)
    return (tokens * size + values) * widths.run.product_bytes


def _columns(activation: str, inner: int) -> int:
    return 2 * inner if activation == "swiglu" else inner
