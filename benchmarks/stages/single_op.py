"""The remaining public ops one by one, for their cost per call at a tiny size."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_kernels as mk
from benchmarks.entry import CPU, Cost, Inputs, Provider, Run, Shape, Stage
from benchmarks.stages.common import generator_on, leaf, normal

LOSSES = ("load_balance_loss", "router_z_loss", "router_similarity_loss")


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0
) -> Inputs:
    """A token-choice plan, tokens or rows where the op reads them, and expert weights."""
    generator = generator_on(device, seed)
    tokens, hidden_size, experts, op = shape["T"], shape["D"], shape["E"], shape["op"]
    width = 4 * hidden_size
    logits = normal(generator, tokens, experts)
    plan = mk.token_choice(logits, shape["K"])
    fixed: dict[str, Any] = {"op": op, "plan": plan}
    if op in LOSSES:
        return Inputs({}, {}, fixed)
    if op == "grouped_gemm":
        leaves = {"rows": normal(generator, plan.num_rows, hidden_size, dtype=dtype)}
        leaves["w"] = normal(
            generator, experts, width, hidden_size, dtype=dtype, fan_in=hidden_size
        )
        return Inputs(leaves, {"out": normal(generator, plan.num_rows, width, dtype=dtype)}, fixed)
    assert op == "expert_mlp", op
    leaves = {
        "x": normal(generator, tokens, hidden_size, dtype=dtype),
        "w_in": normal(generator, experts, 2 * width, hidden_size, dtype=dtype, fan_in=hidden_size),
        "w_out": normal(generator, experts, hidden_size, width, dtype=dtype, fan_in=width),
    }
    return Inputs(leaves, {"out": normal(generator, tokens, hidden_size, dtype=dtype)}, fixed)


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """Expert after expert, token after token, in the precision of the leaves (losses: fp64)."""
    plan, op = inputs.fixed["plan"], inputs.fixed["op"]
    experts, tokens = plan.expert_of_row.long(), plan.token_indices.long()
    if op == "grouped_gemm":
        rows, w = inputs.leaves["rows"], inputs.leaves["w"]
        return {"out": torch.stack([w[e] @ row for e, row in zip(experts, rows, strict=True)])}
    if op == "expert_mlp":
        x, w_in, w_out = inputs.leaves.values()
        outputs = [torch.zeros_like(token) for token in x]
        weights = plan.routing_weights.double()
        for e, t, weight in zip(experts.tolist(), tokens.tolist(), weights, strict=True):
            gate, up = (w_in[e] @ x[t]).chunk(2)
            outputs[t] = outputs[t] + weight * (w_out[e] @ (gate * gate.sigmoid() * up))
        return {"out": torch.stack(outputs)}
    logits = plan.router_logits.double()
    probs, mask = logits.softmax(-1), torch.zeros_like(logits)
    mask[tokens, experts] = 1
    if op == "router_z_loss":
        return {"loss": logits.exp().sum(-1).log().square().mean()}
    if op == "load_balance_loss":
        share = mask.sum(0) * plan.num_experts / mask.sum()
        return {"loss": (share * probs.mean(0)).sum()}
    assert op == "router_similarity_loss", op
    return {"loss": (_pair_weights(mask) * (probs.T @ probs)).sum() / plan.num_tokens}


def _pair_weights(mask: Tensor) -> Tensor:
    """Co-selection counts, the diagonal and the rest each scaled to a mean of 1."""
    together = mask.T @ mask
    own, number = together.diagonal(), mask.shape[1]
    pairs = together - own.diag()
    return own.diag() * (number / own.sum()) + pairs * ((number**2 - number) / pairs.sum())


def _eager(inputs: Inputs) -> Run:
    plan, op = inputs.fixed["plan"], inputs.fixed["op"]
    leaves = {name: leaf(tensor) for name, tensor in inputs.leaves.items()}
    counts = plan.tokens_per_expert

    def grouped_gemm() -> Tensor:
        blocks = leaves["rows"].split(counts.tolist())
        experts = zip(blocks, leaves["w"].unbind(0), strict=True)
        return torch.cat([F.linear(block, w) for block, w in experts])

    def expert_mlp() -> Tensor:
        outputs = []
        blocks = leaves["x"][plan.token_indices].split(counts.tolist())
        experts = zip(blocks, leaves["w_in"].unbind(0), leaves["w_out"].unbind(0), strict=True)
        for block, w_in, w_out in experts:
            gate, up = F.linear(block, w_in).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, w_out))
        weighted = torch.cat(outputs) * plan.routing_weights.unsqueeze(1)
        return torch.zeros_like(leaves["x"]).index_add(0, plan.token_indices, weighted)

    def router_similarity_loss() -> Tensor:
        probs = plan.router_probs
        mask = torch.zeros_like(probs).scatter_(1, plan.expert_indices.long(), 1.0)
        return (_pair_weights(mask) * (probs.T @ probs)).sum() / plan.num_tokens

    functions = (grouped_gemm, expert_mlp, router_similarity_loss)
    return _run({function.__name__: function for function in functions}[op], op, leaves)


def _library(backend: str | None) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        op = inputs.fixed["op"]
        leaves = {name: leaf(tensor) for name, tensor in inputs.leaves.items()}
        # A plan of the library's own making: a backend may carry more in it than its fields.
        given = inputs.fixed["plan"]
        plan = mk.token_choice(given.router_logits, given.top_k, backend=backend)
        args: tuple[Any, ...] = (plan,)
        options: dict[str, Any] = {"backend": backend}
        if op == "grouped_gemm":
            args = (leaves["rows"], leaves["w"], plan.expert_offsets)
        elif op == "expert_mlp":
            args = (leaves["x"], plan, leaves["w_in"], leaves["w_out"])
            options["activation"] = "swiglu"
        function = getattr(mk, op)
        return _run(lambda: function(*args, **options), op, leaves)

    return build


def _run(function: Callable[[], Tensor], op: str, leaves: dict[str, Tensor]) -> Run:
    name = "loss" if op in LOSSES else "out"
    return Run(lambda: (function(),), (name,), {key: [value] for key, value in leaves.items()})


def cost(shape: Shape, itemsize: int, mode: str) -> Cost:
    """No limit: at these sizes the time is the call."""
    return Cost(0, 0)


STAGE = Stage(
    make_inputs,
    expected,
    {
        "eager": Provider(_eager, "the op's lean sequence of PyTorch calls"),
        "reference": Provider(_library("reference"), "moe_kernels, reference backend"),
        "ours": Provider(_library(None), "moe_kernels", kind="ours"),
    },
    cost,
)
