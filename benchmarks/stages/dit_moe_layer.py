"""A DiT-MoE layer: token choice, bias-free SwiGLU experts, perhaps a shared one, balance loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_kernels as mk
from benchmarks.entry import CPU, Cost, Inputs, Provider, Run, Shape, Stage
from benchmarks.libraries import EXPERTS
from benchmarks.libraries.megablocks import OwnLayout
from benchmarks.stages import dit_moe_peers as peers
from benchmarks.stages.common import (
    expert_tokens,
    generator_on,
    leaf,
    normal,
    separated_tokens,
    top_mask,
)
from benchmarks.stages.skew import load, skewed_tokens

# Unless the shape says otherwise, as "K", "width" and "shared".
TOP_K = 2
WIDTH = 4  # an expert's intermediate size over the hidden size
SHARED_WIDTH = 2  # of the shared expert; 0 for none
OUTPUTS = ("out", "load_balance_loss")


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0
) -> Inputs:
    """(B, S, D) tokens, all weights, and random gradients of the output and the loss."""
    batch_size, seq_len, hidden_size, experts = (shape[name] for name in "BSDE")
    width, shared_width = _width(shape) * hidden_size, _shared_width(shape) * hidden_size
    top_k, skew = _top_k(shape), shape.get("skew", "uniform")
    generator = generator_on(device, seed)

    def drawn(*sizes: int, fan_in: int = 1) -> Tensor:
        return normal(generator, *sizes, dtype=dtype, fan_in=fan_in)

    x = drawn(batch_size * seq_len, hidden_size)
    router = drawn(experts, hidden_size, fan_in=hidden_size)
    if skew != "uniform":
        x = skewed_tokens(x, router, skew, top_k, generator)
    x = separated_tokens(x, lambda x: _affinity(x, router), top_k, generator)
    leaves = {
        "x": x.view(batch_size, seq_len, hidden_size),
        "router": router,
        "w_in": drawn(experts, 2 * width, hidden_size, fan_in=hidden_size),
        "w_out": drawn(experts, hidden_size, width, fan_in=width),
    }
    if shared_width:
        leaves["shared_in"] = drawn(2 * shared_width, hidden_size, fan_in=hidden_size)
        leaves["shared_out"] = drawn(hidden_size, shared_width, fan_in=shared_width)
    upstream = {
        "out": drawn(batch_size, seq_len, hidden_size),
        "load_balance_loss": normal(generator),
    }
    fixed: dict[str, Any] = {"shape": shape}
    if "skew" in shape:
        fixed["load"] = load(_affinity(x, router), top_k)
    return Inputs(leaves, upstream, fixed)


def _affinity(x: Tensor, router: Tensor) -> Tensor:
    return (x.double() @ router.double().T).softmax(-1)


def _top_k(shape: Shape) -> int:
    return int(shape.get("K", TOP_K))


def _width(shape: Shape) -> int:
    return int(shape.get("width", WIDTH))


def _shared_width(shape: Shape) -> int:
    return int(shape.get("shared", SHARED_WIDTH))


def _activated_width(shape: Shape) -> int:
    """Of all experts that a token passes, over the hidden size."""
    return _top_k(shape) * _width(shape) + _shared_width(shape)


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """Expert after expert on the tokens that chose it, in the precision of the inputs."""
    x, router, w_in, w_out, *shared = inputs.leaves.values()
    flat, top_k = x.flatten(0, 1), _top_k(inputs.fixed["shape"])
    probs = (flat @ router.T).softmax(-1)
    mask = top_mask(probs, top_k, dim=1)

    def swiglu(tokens: Tensor, into: Tensor, out: Tensor) -> Tensor:
        gate, up = (tokens @ into.T).chunk(2, dim=-1)
        return (gate * gate.sigmoid() * up) @ out.T

    out = swiglu(flat, *shared) if shared else torch.zeros_like(flat)
    weights = list(zip(w_in.unbind(0), w_out.unbind(0), strict=True))
    for expert, tokens in expert_tokens(mask):
        y = swiglu(flat[tokens], *weights[expert])
        out = out.index_add(0, tokens, probs[tokens, expert].unsqueeze(1) * y)
    share = mask.sum(0) * (probs.shape[1] / (top_k * flat.shape[0]))
    return {"out": out.view_as(x), "load_balance_loss": (share * probs.mean(0)).sum()}


def _published(inputs: Inputs) -> Run:
    stacked = inputs.leaves
    x, router = leaf(stacked["x"]), leaf(stacked["router"])
    halves = [half for w in stacked["w_in"] for half in w.chunk(2)]
    w_in, w_out = [leaf(half) for half in halves], [leaf(w) for w in stacked["w_out"]]
    experts = list(zip(w_in[::2], w_in[1::2], w_out, strict=True))
    leaves = {"x": [x], "router": [router], "w_in": w_in, "w_out": w_out}
    shared: peers.SwiGLU | None = None
    if "shared_in" in stacked:
        leaves["shared_in"] = [leaf(half) for half in stacked["shared_in"].chunk(2)]
        leaves["shared_out"] = [leaf(stacked["shared_out"])]
        shared = (*leaves["shared_in"], *leaves["shared_out"])
    top_k = _top_k(inputs.fixed["shape"])
    return Run(lambda: peers.published(x, router, experts, shared, top_k), OUTPUTS, leaves)


def _stacked(function: Callable[..., tuple[Tensor, ...]]) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        leaves = {name: [leaf(tensor)] for name, tensor in inputs.leaves.items()}
        x, router, w_in, w_out, *shared = (parts[0] for parts in leaves.values())
        top_k = _top_k(inputs.fixed["shape"])
        return Run(lambda: function(x, router, w_in, w_out, tuple(shared), top_k), OUTPUTS, leaves)

    return build


def _compiled(inputs: Inputs) -> Run:
    # Symbolic sizes: the tokens of an expert change with every call of a real model.
    return _stacked(torch.compile(peers.good_eager, dynamic=True))(inputs)


def _grouped_compiled(inputs: Inputs) -> Run:
    return _stacked(torch.compile(peers.grouped_permute))(inputs)


def _from_library(name: str) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        # Raises the reason why it is skipped, where the library cannot run.
        experts = EXPERTS[name].on(inputs.leaves["x"].device)
        if isinstance(experts, OwnLayout):
            return _in_own_layout(experts, inputs)
        return _stacked(partial(peers.with_experts, experts))(inputs)

    return build


def _in_own_layout(experts: OwnLayout, inputs: Inputs) -> Run:
    """The library's own matrices are the leaves, so that no call converts any."""
    given = dict(inputs.leaves)
    matrices = experts.convert(given.pop("w_in"), w_out := given.pop("w_out"))
    own = dict(zip(experts.names, matrices, strict=True))
    leaves = {name: [leaf(tensor)] for name, tensor in (given | own).items()}
    x, router, *shared = (leaves[name][0] for name in given)
    used = tuple(leaves[name][0] for name in experts.names)
    top_k, num_experts = _top_k(inputs.fixed["shape"]), w_out.shape[0]

    def run(flat: Tensor, weights: Tensor, chosen: Tensor, *_: Tensor) -> Tensor:
        return experts.run(flat, weights, chosen, num_experts, used)

    def canonical(named: dict[str, Tensor]) -> dict[str, Tensor]:
        if "dw1" not in named:
            return named
        gradients = tuple(named.pop(f"d{name}") for name in experts.names)
        return named | dict(
            zip(("dw_in", "dw_out"), experts.restore(gradients, num_experts), strict=True)
        )

    return Run(
        lambda: peers.with_experts(run, x, router, used[0], used[2], tuple(shared), top_k),
        OUTPUTS,
        leaves,
        canonical,
    )


def _library(backend: str | None) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        shape = inputs.fixed["shape"]
        hidden_size, experts = shape["D"], shape["E"]
        moe = mk.MoE(
            hidden_size,
            _width(shape) * hidden_size,
            experts,
            router=mk.TokenChoiceRouter(hidden_size, experts, _top_k(shape), device="meta"),
            activation="swiglu",
            shared_intermediate_size=_shared_width(shape) * hidden_size,
            device="meta",
        )
        x = leaf(inputs.leaves["x"])
        weights = {name: nn.Parameter(w) for name, w in list(inputs.leaves.items())[1:]}
        moe.router.weight = weights["router"]
        moe.experts.gate_up_proj, moe.experts.down_proj = weights["w_in"], weights["w_out"]
        if moe.shared_expert is not None:
            shared_in, shared_out = moe.shared_expert.gate_up_proj, moe.shared_expert.down_proj
            assert isinstance(shared_in, nn.Linear)
            shared_in.weight, shared_out.weight = weights["shared_in"], weights["shared_out"]

        def call() -> tuple[Tensor, ...]:
            out, plan = moe(x)
            return (out, mk.load_balance_loss(plan)) if torch.is_grad_enabled() else (out,)

        def call_backend() -> tuple[Tensor, ...]:
            with mk.use_backend(backend):
                return call()

        leaves = {"x": [x]} | {name: [weight] for name, weight in weights.items()}
        return Run(call if backend is None else call_backend, OUTPUTS, leaves)

    return build


def _dense(inputs: Inputs) -> Run:
    """A SwiGLU MLP as wide as the experts that a token passes; its own weights."""
    x = leaf(inputs.leaves["x"])
    hidden_size = x.shape[-1]
    width = _activated_width(inputs.fixed["shape"]) * hidden_size
    generator = generator_on(x.device)
    w_in = leaf(normal(generator, 2 * width, hidden_size, dtype=x.dtype, fan_in=hidden_size))
    w_out = leaf(normal(generator, hidden_size, width, dtype=x.dtype, fan_in=width))

    def call() -> tuple[Tensor, ...]:
        gate, up = F.linear(x, w_in).chunk(2, dim=-1)
        return (F.linear(F.silu(gate) * up, w_out),)

    return Run(call, ("out",), {"x": [x], "w_in": [w_in], "w_out": [w_out]})


def cost(shape: Shape, itemsize: int, mode: str) -> Cost:
    """The activated products; weights and tokens once, in backward also their gradients."""
    batch_size, seq_len, hidden_size, experts = (shape[name] for name in "BSDE")
    tokens, matrices = batch_size * seq_len * hidden_size, 3 * hidden_size * hidden_size
    activated = _activated_width(shape) * matrices
    flops = 2 * batch_size * seq_len * (activated + experts * hidden_size)
    weights = (experts * _width(shape) + _shared_width(shape)) * matrices
    forward = Cost(flops, itemsize * (weights + 2 * tokens))
    backward = Cost(2 * flops, itemsize * (2 * weights + 3 * tokens))
    both = Cost(3 * flops, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "both": both}[mode]


STAGE = Stage(
    make_inputs,
    expected,
    {
        "published": Provider(_published, "loop over experts with boolean masks"),
        "good_eager": Provider(_stacked(peers.good_eager), "sort, split, F.linear, index_add"),
        "compiled": Provider(_compiled, "good_eager under torch.compile", compiled=True),
        "grouped_mm": Provider(_stacked(peers.grouped), "sort, F.grouped_mm, index_add"),
        "grouped_permute": Provider(
            _stacked(peers.grouped_permute), "sort, F.grouped_mm, gather back, sum over K"
        ),
        "grouped_compiled": Provider(
            _grouped_compiled, "grouped_permute under torch.compile", compiled=True
        ),
        **{
            name: Provider(_from_library(name), provider.summary, library=True)
            for name, provider in EXPERTS.items()
        },
        "reference": Provider(_library("reference"), "mk.MoE, reference backend"),
        "dense_limit": Provider(_dense, "dense MLP of the same activated FLOPs", kind="limit"),
        "ours": Provider(_library(None), "mk.MoE", kind="ours"),
    },
    cost,
)
