"""An expert-choice layer: routing inside each image, two-matrix GELU experts with biases."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_kernels as mk
from benchmarks.entry import CPU, Cost, Inputs, Provider, Run, Shape, Stage
from benchmarks.stages import ec_peers as peers
from benchmarks.stages.common import (
    expert_tokens,
    generator_on,
    leaf,
    normal,
    separated_tokens,
    top_mask,
)

# Unless the shape says otherwise, as "capacity_factor" and "width".
CAPACITY_FACTOR = 2.0
WIDTH = 4  # an expert's intermediate size over the hidden size


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0
) -> Inputs:
    """(B, S, D) tokens, all weights, and a random gradient of the output."""
    batch_size, seq_len, hidden_size, experts = (shape[name] for name in "BSDE")
    width = _width(shape) * hidden_size
    capacity = mk.expert_capacity(seq_len, experts, _capacity_factor(shape))
    generator = generator_on(device, seed)

    def drawn(*sizes: int, fan_in: int = 1) -> Tensor:
        return normal(generator, *sizes, dtype=dtype, fan_in=fan_in)

    x = drawn(batch_size * seq_len, hidden_size)
    router = drawn(experts, hidden_size, fan_in=hidden_size)
    x = separated_tokens(
        x,
        lambda x: (x.double() @ router.double().T).softmax(-1),
        capacity,
        generator,
        num_groups=batch_size,
    )
    leaves = {
        "x": x.view(batch_size, seq_len, hidden_size),
        "router": router,
        "w_in": drawn(experts, width, hidden_size, fan_in=hidden_size),
        "bias_in": drawn(experts, width, fan_in=hidden_size),
        "w_out": drawn(experts, hidden_size, width, fan_in=width),
        "bias_out": drawn(experts, hidden_size, fan_in=width),
    }
    upstream = {"out": drawn(batch_size, seq_len, hidden_size)}
    return Inputs(leaves, upstream, {"shape": shape, "C": capacity})


def _capacity_factor(shape: Shape) -> float:
    return float(shape.get("capacity_factor", CAPACITY_FACTOR))


def _width(shape: Shape) -> int:
    return int(shape.get("width", WIDTH))


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """Expert after expert on the tokens that it chose, in the precision of the inputs."""
    x, router, w_in, bias_in, w_out, bias_out = inputs.leaves.values()
    flat, probs = x.flatten(0, 1), (x @ router.T).softmax(-1)
    mask = top_mask(probs, inputs.fixed["C"], dim=1).flatten(0, 1)
    probs = probs.flatten(0, 1)
    out = torch.zeros_like(flat)
    up, down = w_in.unbind(0), w_out.unbind(0)
    for expert, tokens in expert_tokens(mask):
        h = F.gelu(flat[tokens] @ up[expert].T + bias_in[expert], approximate="tanh")
        y = h @ down[expert].T + bias_out[expert]
        out = out.index_add(0, tokens, probs[tokens, expert].unsqueeze(1) * y)
    return {"out": out.view_as(x)}


def _plain(function: Callable[..., Tensor]) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        leaves = {name: [leaf(tensor)] for name, tensor in inputs.leaves.items()}
        tensors = [parts[0] for parts in leaves.values()]
        capacity = inputs.fixed["C"]
        return Run(lambda: (function(*tensors, capacity),), ("out",), leaves)

    return build


def _compiled(inputs: Inputs) -> Run:
    return _plain(torch.compile(peers.good_eager))(inputs)


def _library(backend: str | None) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        shape = inputs.fixed["shape"]
        hidden_size, experts, factor = shape["D"], shape["E"], _capacity_factor(shape)
        router = mk.ExpertChoiceRouter(hidden_size, experts, factor, device="meta")
        moe = mk.MoE(
            hidden_size,
            _width(shape) * hidden_size,
            experts,
            router=router,
            activation="gelu_tanh",
            bias=True,
            device="meta",
        )
        x = leaf(inputs.leaves["x"])
        weights = {name: nn.Parameter(w) for name, w in list(inputs.leaves.items())[1:]}
        for module, name, weight in (
            (moe.router, "weight", weights["router"]),
            (moe.experts, "up_proj", weights["w_in"]),
            (moe.experts, "up_proj_bias", weights["bias_in"]),
            (moe.experts, "down_proj", weights["w_out"]),
            (moe.experts, "down_proj_bias", weights["bias_out"]),
        ):
            setattr(module, name, weight)

        def call_backend() -> tuple[Tensor, ...]:
            with mk.use_backend(backend):
                return (moe(x)[0],)

        leaves = {"x": [x]} | {name: [weight] for name, weight in weights.items()}
        call = (lambda: (moe(x)[0],)) if backend is None else call_backend
        return Run(call, ("out",), leaves)

    return build


def _dense(inputs: Inputs) -> Run:
    """A GELU MLP as wide as the experts that a token passes on average; its own weights."""
    x = leaf(inputs.leaves["x"])
    hidden_size, shape = x.shape[-1], inputs.fixed["shape"]
    width = int(_capacity_factor(shape) * _width(shape) * hidden_size)
    generator = generator_on(x.device)
    weights = {
        "w_in": normal(generator, width, hidden_size, dtype=x.dtype, fan_in=hidden_size),
        "bias_in": normal(generator, width, dtype=x.dtype, fan_in=hidden_size),
        "w_out": normal(generator, hidden_size, width, dtype=x.dtype, fan_in=width),
        "bias_out": normal(generator, hidden_size, dtype=x.dtype, fan_in=width),
    }
    leaves = {name: leaf(weight) for name, weight in weights.items()}
    w_in, bias_in, w_out, bias_out = leaves.values()

    def call() -> tuple[Tensor, ...]:
        return (F.linear(F.gelu(F.linear(x, w_in, bias_in), approximate="tanh"), w_out, bias_out),)

    return Run(call, ("out",), {"x": [x]} | {name: [w] for name, w in leaves.items()})


def cost(shape: Shape, itemsize: int, mode: str) -> Cost:
    """The activated products; weights and tokens once, in backward also their gradients."""
    batch_size, seq_len, hidden_size, experts = (shape[name] for name in "BSDE")
    tokens, matrices = batch_size * seq_len * hidden_size, 2 * _width(shape) * hidden_size**2
    activated = _capacity_factor(shape) * matrices
    flops = 2 * batch_size * seq_len * (activated + experts * hidden_size)
    forward = Cost(flops, itemsize * (experts * matrices + 2 * tokens))
    backward = Cost(2 * flops, itemsize * (2 * experts * matrices + 3 * tokens))
    both = Cost(3 * flops, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "both": both}[mode]


STAGE = Stage(
    make_inputs,
    expected,
    {
        "one_hot": Provider(_plain(peers.one_hot), "one-hot dispatch and combine by einsum"),
        "good_eager": Provider(_plain(peers.good_eager), "gather, bmm, index_add"),
        "compiled": Provider(_compiled, "good_eager under torch.compile", compiled=True),
        "reference": Provider(_library("reference"), "mk.MoE, reference backend"),
        "dense_limit": Provider(_dense, "dense MLP of the same activated FLOPs", kind="limit"),
        "ours": Provider(_library(None), "mk.MoE", kind="ours"),
    },
    cost,
)
