"""Experts divided among ranks against the same layer in one process."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import moe_kernels as mk
from moe_kernels.distributed import shard_experts
from moe_kernels.upcycling.experts import UnfusedExperts
from moe_kernels.upcycling.module import UpcycledMLP
from tests.ranks import run_ranks

from .parallel_layers import (
    DOUT_SEED,
    EXPERTS,
    HIDDEN,
    SEQ,
    expert_mesh,
    gradients,
    make_layer,
    numbers,
    relative,
    worst,
)

Step = Callable[[mk.MoE, Tensor], Tensor]


def plain(layer: mk.MoE, x: Tensor) -> Tensor:
    out: Tensor = layer(x)[0]
    return out


def recomputed(layer: mk.MoE, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(
        plain, layer, x, use_reentrant=False, context_fn=mk.save_routing_context_fn
    )
    return out


def twice(layer: mk.MoE, x: Tensor) -> Tensor:
    """Two calls of one layer in one graph."""
    return plain(layer, x + plain(layer, x))


STEPS: dict[str, Step] = {f.__name__: f for f in (plain, recomputed, twice)}


def compare(
    router: str, batches: list[int], step: str, options: dict[str, Any], shards: int = 1
) -> float:
    """Largest relative error of this rank's output and gradients."""
    options = dict(options)
    transport = options.pop("transport", "auto")
    mk.use_backend(options.pop("backend", "cpu,reference"))
    single, layer = make_layer(router, **options), make_layer(router, **options)
    if shards == 1:
        assert shard_experts(layer, expert_mesh(), transport=transport) == 1
    else:
        mesh = init_device_mesh("cpu", (shards, len(batches) // shards), mesh_dim_names=("s", "e"))
        shard_experts(layer, mesh["e"], transport=transport)
        experts = fully_shard(layer.experts, mesh=mesh["s"])
        experts.set_gradient_divide_factor(1.0)
        experts.set_force_sum_reduction_for_comms(True)
    x = numbers(sum(batches), SEQ, HIDDEN, seed=1).requires_grad_()
    dout = numbers(sum(batches), SEQ, HIDDEN, seed=DOUT_SEED)
    # What one process would do for each rank's images: pools do not cross them.
    parts = [STEPS[step if step == "twice" else "plain"](single, part) for part in x.split(batches)]
    expected = torch.cat(parts)
    expected.backward(dout)
    assert x.grad is not None
    rank = torch.distributed.get_rank()
    own = x.detach().split(batches)[rank].clone().requires_grad_()
    out = STEPS[step](layer, own)
    out.backward(dout.split(batches)[rank])
    assert own.grad is not None
    references = {n: p.grad for n, p in single.named_parameters() if p.grad is not None}
    return max(
        relative(out, parts[rank]),
        relative(own.grad, x.grad.split(batches)[rank]),
        worst(gradients(layer), references),
    )


@pytest.mark.parametrize(
    ("router", "batches", "step", "options", "shards"),
    [
        ("expert_choice", [2], "plain", {}, 1),
        ("expert_choice", [2, 2], "plain", {}, 1),
        ("expert_choice", [1] * 4, "plain", {"activation": "swiglu"}, 1),
        ("expert_choice", [2, 1], "plain", {"transport": "ragged"}, 1),
        ("expert_choice", [2, 2], "recomputed", {}, 1),
        ("expert_choice", [1] * 4, "plain", {}, 2),
        ("token_choice", [2, 2], "plain", {"backend": "reference"}, 1),
        ("token_choice", [1, 3, 0, 2], "plain", {}, 1),
        ("token_choice", [0, 2], "plain", {"shared_intermediate_size": 0, "bias": False}, 1),
        ("token_choice", [2, 1], "recomputed", {}, 1),
        ("token_choice", [1, 0, 2, 1], "twice", {"activation": "swiglu"}, 2),
    ],
)
def test_as_one_process(
    router: str, batches: list[int], step: str, options: dict[str, Any], shards: int
) -> None:
    errors = run_ranks(compare, len(batches), router, batches, step, options, shards)
    assert max(errors) < 1e-12


def skewed(target: int | None) -> float:
    """Every token of every rank to two experts, of one rank; the others get no row at all."""
    mk.use_backend("cpu,reference")
    rank = torch.distributed.get_rank()
    single, layer = make_layer("token_choice"), make_layer("token_choice")
    shard_experts(layer, expert_mesh())
    logits = torch.zeros(4 * SEQ, EXPERTS, dtype=torch.float64)
    # On each rank another pair, or one for all.
    first = 2 * (rank if target is None else target)
    logits[:, first : first + 2] = 5.0
    x = numbers(4 * SEQ, HIDDEN, seed=10 + rank).requires_grad_()
    again = x.detach().clone().requires_grad_()
    dout = numbers(4 * SEQ, HIDDEN, seed=20 + rank)
    expected = single.experts(again, mk.token_choice(logits, 2))
    expected.backward(dout)
    out = layer.experts(x, mk.token_choice(logits, 2))
    out.backward(dout)
    assert x.grad is not None
    assert again.grad is not None
    found = gradients(layer.experts)
    reference = {}
    for name, parameter in single.experts.named_parameters():
        assert parameter.grad is not None
        reference[name] = parameter.grad
        torch.distributed.all_reduce(reference[name])
    return max(relative(out, expected), relative(x.grad, again.grad), worst(found, reference))


@pytest.mark.parametrize("target", [0, 3, None])
def test_total_skew(target: int | None) -> None:
    assert max(run_ranks(skewed, 4, target)) < 1e-12


def upcycled() -> float:
    """What ``upcycle`` makes of an MLP whose activation the fused experts do not have."""
    mk.use_backend("cpu,reference")
    rank = torch.distributed.get_rank()
    blocks = []
    for _ in range(2):
        layer = make_layer("token_choice")
        assert isinstance(layer.router, mk.TokenChoiceRouter)
        torch.manual_seed(4)
        experts = UnfusedExperts(HIDDEN, 24, EXPERTS, "quick_gelu", True, bias=True).double()
        blocks.append(UpcycledMLP(layer.router, experts, layer.shared_expert))
    single, block = blocks
    shard_experts(block, expert_mesh())
    is_late = []
    block.experts.register_forward_pre_hook(lambda _, given: is_late.append(callable(given[2])))
    x = numbers(2, 2, SEQ, HIDDEN, seed=1)
    dout = numbers(2, 2, SEQ, HIDDEN, seed=DOUT_SEED)
    outputs = [single(x[owner]) for owner in range(2)]
    torch.stack(outputs).backward(dout)
    with mk.collect_plans(block) as plans:
        out = block(x[rank])
    out.backward(dout[rank])
    assert is_late == [True]
    assert [plan.num_rows for plan in plans[""]] == [2 * 2 * SEQ]
    references = {n: p.grad for n, p in single.named_parameters() if p.grad is not None}
    return max(relative(out, outputs[rank]), worst(gradients(block), references))


def test_upcycled_layers() -> None:
    assert max(run_ranks(upcycled, 2)) < 1e-12


def accumulate() -> float:
    """Two micro-batches, with frozen weights in one expert matrix and gradients in the others."""
    mk.use_backend("cpu,reference")
    rank = torch.distributed.get_rank()
    single, layer = make_layer("expert_choice"), make_layer("expert_choice")
    for each in (single, layer):
        each.experts.down_proj.requires_grad_(False)
    shard_experts(layer, expert_mesh())
    assert not layer.experts.down_proj.requires_grad
    x = numbers(2, 2, 2, SEQ, HIDDEN, seed=1)  # (micro-batch, rank, B, S, D)
    dout = numbers(2, 2, 2, SEQ, HIDDEN, seed=DOUT_SEED)
    for micro in range(2):
        for owner in range(2):
            plain(single, x[micro, owner]).backward(dout[micro, owner])
        plain(layer, x[micro, rank]).backward(dout[micro, rank])
        with torch.no_grad():
            plain(layer, x[micro, rank])
    assert layer.experts.down_proj.grad is None
    for each in (single, layer):
        each.experts.down_proj.grad = torch.zeros_like(each.experts.down_proj)
    references = {n: p.grad for n, p in single.named_parameters() if p.grad is not None}
    return worst(gradients(layer), references)


def test_accumulation_and_frozen_weights() -> None:
    assert max(run_ranks(accumulate, 2)) < 1e-12


def without_gradient() -> tuple[float, bool]:
    """no_grad and all weights frozen: the first gives the same output, the second dx alone.

    The anomaly mode must not look at gradients that have not arrived.
    """
    mk.use_backend("cpu,reference")
    layer, single = make_layer("token_choice"), make_layer("token_choice")
    layer.requires_grad_(False)
    shard_experts(layer, expert_mesh())
    x = numbers(1, SEQ, HIDDEN, seed=torch.distributed.get_rank()).requires_grad_()
    with torch.no_grad():
        still = plain(layer, x)
    with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():
        torch.full((SEQ * 2, HIDDEN), torch.nan, dtype=torch.float64)  # what new memory may hold
        out = plain(layer, x)
        out.backward(numbers(1, SEQ, HIDDEN, seed=DOUT_SEED))
    return relative(still, plain(single, x)), x.grad is not None and torch.equal(still, out)


def test_without_gradient() -> None:
    for error, has_dx in run_ranks(without_gradient, 2):
        assert error < 1e-12
        assert has_dx


def sixteen_bits(dtype: torch.dtype, autocast: bool) -> tuple[float, float, set[torch.dtype]]:
    """Errors against fp64, here and in one process, and the dtypes that travelled."""
    mk.use_backend("cpu,reference")
    exact, single = make_layer("expert_choice"), make_layer("expert_choice")
    layer = make_layer("expert_choice")
    weights = torch.float32 if autocast else dtype
    for each in (single, layer):
        each.to(weights)
    # The same choice everywhere, whatever the rounding.
    exact.load_state_dict({n: p.double() for n, p in single.state_dict().items()})
    shard_experts(layer, expert_mesh())
    x = numbers(2, SEQ, HIDDEN, seed=torch.distributed.get_rank()).to(weights)
    sent: set[torch.dtype] = set()
    send = torch.distributed.all_to_all_single

    def recording(output: Tensor, given: Tensor, *args: Any, **options: Any) -> Any:
        sent.add(given.dtype)
        return send(output, given, *args, **options)

    torch.distributed.all_to_all_single = recording
    expected = plain(exact, x.double())
    with torch.autocast("cpu", dtype, enabled=autocast):
        ours, theirs = plain(layer, x), plain(single, x)
        ours.backward(numbers(*ours.shape, seed=DOUT_SEED).to(ours.dtype))
    assert ours.dtype == theirs.dtype == weights
    return relative(ours.double(), expected), relative(theirs.double(), expected), sent


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, autocast: bool) -> None:
    for ours, theirs, sent in run_ranks(sixteen_bits, 2, dtype, autocast):
        # An expert's rows are rounded once more, before they are weighted.
        assert ours <= 2 * theirs + torch.finfo(dtype).eps
        assert sent == {dtype}
