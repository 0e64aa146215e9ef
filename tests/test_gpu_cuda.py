"""CUDA C++ kernels on a GPU: every size, team of blocks and dtype, at the sizes of real use.

What routing has to do is in ``moe_kernels/routing_checks.py``. The tests called small are also what
compute-sanitizer runs (``benchmarks/gpu/sanitize.py``): their inputs are made and their results
judged on the CPU, so that it has nothing to check but these kernels.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.testing import assert_as_accurate, make_logits, relative_error

from .gpu_cases import CUDA_DEVICES, draw, require_memory

if (reason := BACKENDS["cuda"].why_no_kernel("expert_choice")) is not None:
    pytest.skip(f"the cuda backend {reason}", allow_module_level=True)

from moe_kernels.backends.cuda import route as cuda_route

from .moe_kernels.routing_cases import PER_TOKEN, ROUTES
from .moe_kernels.routing_checks import (
    AFFINITIES,
    INF,
    KINDS,
    NAN,
    broken_logits,
    check_expert_choice,
    check_results,
    check_token_choice,
    logits_of,
    token_choice_cases,
)

ops = torch.ops.moe_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Teams of csrc/cuda/kernels.hpp: blocks of a cluster, of the grid, and the grid in each pool.
TEAMS = {"automatic": 0, "cluster": 1, "grid": 2, "chunks": 3}

POOL_SIZES = {
    "cuda": (1, 31, 256, 1000, 1024, 1025, 4096, 16384, 16385, 100_000),
    "cpu": (1, 40),
}
# Groups, S, E, C: many small pools, few long ones, blocks without a tile of their own.
MANY_GROUPS = {
    "cuda": (
        (256, 256, 8, 64),
        (512, 64, 16, 8),
        (2000, 31, 5, 3),
        (3, 1000, 64, 400),
        (5, 1, 3, 1),
    ),
    "cpu": ((7, 9, 5, 2),),
}
BROKEN = {"cuda": ((2, 1024, 16), (1, 20_000, 8), (40, 50, 3)), "cpu": ((2, 30, 5),)}
TOKENS = {"cuda": (1, 33, 8192, 32768, 2**20), "cpu": (1, 33)}
LARGEST_TOKEN_CHOICE = 2**24  # logits
LARGEST_SIMULATED = 400
RESULTS_OF = {"cuda": ((270, 6), (270, 40), (1000, 8), (64, 130)), "cpu": ((24, 6),)}


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    # The reference has the similarity loss that the CUDA backend lacks.
    with mk.use_backend("cuda,reference"):
        yield


@pytest.fixture
def unpoisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves memory as it comes: what nobody wrote stays so, and nothing large is filled."""
    monkeypatch.undo()


def bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().view(torch.int32)


def check_every_team(
    monkeypatch: pytest.MonkeyPatch, logits: Tensor, capacity: int, groups: int, affinity: str
) -> None:
    """Check the plan of each team; all have to have the bits of the first."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for name, team in TEAMS.items():
        monkeypatch.setattr(cuda_route, "TEAM", team)
        plan = check_expert_choice(logits, capacity, groups, affinity)
        assert plan.fused is not None
        found[name] = (plan.fused.packed, bits(plan.routing_weights))
        for one, other in zip(found["automatic"], found[name], strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("device", CUDA_DEVICES)
@pytest.mark.parametrize("experts", [1, 8, 16, 64, 130, 256])
def test_expert_choice_of_every_size_by_every_team(device, experts, monkeypatch):
    choices = itertools.cycle(itertools.product(KINDS, AFFINITIES))
    choices = itertools.islice(choices, experts % 18, None)  # others than the last test's
    for size, (kind, affinity) in zip(POOL_SIZES[device], choices, strict=False):
        if device == "cpu" and size * experts > LARGEST_SIMULATED:
            continue
        groups = 3 if size < 1025 else 1
        logits = logits_of(kind, groups * size, experts).to(device)
        for capacity in {1, max(1, 2 * size // experts), size if experts <= 64 else 1}:
            if capacity <= size:
                check_every_team(monkeypatch, logits, capacity, groups, affinity)


@pytest.mark.parametrize("device", CUDA_DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_expert_choice_in_many_groups(device, kind, monkeypatch):
    for groups, size, experts, capacity in MANY_GROUPS[device]:
        logits = logits_of(kind, groups * size, experts).to(device)
        check_every_team(monkeypatch, logits, capacity, groups, "softmax")


@pytest.mark.gpu
@pytest.mark.parametrize("affinity", AFFINITIES)
def test_one_pool_of_a_million_tokens(affinity):
    tokens, experts = 2**20, 16
    for kind in ("normal", "ties"):
        logits = logits_of(kind, tokens, experts).cuda()
        for capacity in (1, 2 * tokens // experts):
            check_expert_choice(logits, capacity, 1, affinity)


@pytest.mark.parametrize("device", CUDA_DEVICES)
@pytest.mark.parametrize("affinity", AFFINITIES)
def test_non_finite_logits_rank_last_and_first(device, affinity, monkeypatch):
    for groups, size, experts in BROKEN[device]:
        logits = broken_logits(groups * size, experts, seed=1).to(device)
        check_every_team(monkeypatch, logits, size // 3, groups, affinity)
        if affinity != "identity":
            check_token_choice(logits, min(experts, 4), affinity, groups, {})


@pytest.mark.parametrize("device", CUDA_DEVICES)
def test_infinite_logits_and_both_zeros_rank_as_floats(device, monkeypatch):
    values = [0.0, -0.0, INF, -INF, NAN, 1e-45, -1e-45, 3e38, -3e38, -0.0, 0.0, NAN]
    logits = torch.tensor(values, device=device).unsqueeze(1)
    for capacity in range(1, len(values) + 1):
        check_every_team(monkeypatch, logits, capacity, 1, "identity")


@pytest.mark.parametrize("device", CUDA_DEVICES)
@pytest.mark.parametrize("top_k", [1, 2, 6, 8])
def test_token_choice_of_every_size(device, top_k):
    choices = itertools.cycle(itertools.product(KINDS, ("softmax", "sigmoid")))
    for tokens, experts in itertools.product(TOKENS[device], (8, 16, 64, 130, 256)):
        kind, affinity = next(choices)
        if tokens * experts > LARGEST_TOKEN_CHOICE:
            continue
        groups = next(groups for groups in (64, 3, 1) if tokens % groups == 0)
        logits = logits_of(kind, tokens, experts).to(device)
        check_token_choice(logits, top_k, affinity, groups, {})


@pytest.mark.parametrize("device", CUDA_DEVICES)
def test_token_choice_with_expert_groups_and_a_bias(device):
    for experts, top_k, options in token_choice_cases():
        options = {
            name: option.to(device) if isinstance(option, Tensor) else option
            for name, option in options.items()
        }
        for tokens, kind in ((33, "ties"), (4099 if device == "cuda" else 9, "normal")):
            logits = logits_of(kind, tokens, experts, seed=3).to(device)
            check_token_choice(logits, top_k, "sigmoid", 1, options)


@pytest.mark.parametrize("device", CUDA_DEVICES)
@pytest.mark.parametrize("route", ROUTES)
def test_weights_losses_and_gradients_equal_the_reference(device, route):
    for tokens, experts in RESULTS_OF[device]:
        for options in ({}, PER_TOKEN):
            if route != "identity" or options is not PER_TOKEN:  # these are not normalised
                check_results(
                    route, make_logits(tokens, experts).to(device), "cuda,reference", options
                )


def moved(x: Tensor, rows: Tensor, plan: mk.RoutingPlan, terms: list[Tensor]) -> list[Tensor]:
    """Results of dispatch and combine, and all their gradients."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    leaves = [tensor.detach().requires_grad_() for tensor in (x, rows, *terms)]
    weights = plan.routing_weights.detach().to(wide).requires_grad_()
    fields = {**vars(plan), "routing_weights": weights}
    gathered = mk.dispatch(leaves[0], plan)
    shared, residual = leaves[2:]
    out = mk.combine(leaves[1], mk.RoutingPlan(**fields), shared=shared, residual=residual)
    upstream = [torch.linspace(-1, 2, y.numel()).cos().view_as(y).to(y) for y in (gathered, out)]
    gradients = torch.autograd.grad([gathered, out], [*leaves, weights], upstream)
    return [gathered.detach(), out.detach(), *gradients]


def check_rows_are_moved(device: str, plan: mk.RoutingPlan, width: int, dtype: torch.dtype) -> None:
    """Dispatch and combine against the reference: copied bits equal, sums as accurate."""
    judge = plan.token_indices.device
    x, shared, residual = (torch.randn(plan.num_tokens, width).to(dtype) for _ in range(3))
    rows = torch.randn(plan.num_rows, width).to(dtype)
    tensors = [tensor.to(device) for tensor in (x, rows, shared, residual)]
    found = [value.to(judge) for value in moved(*tensors[:2], on(device, plan), tensors[2:])]
    x, rows, shared, residual = (tensor.to(judge) for tensor in tensors)
    with mk.use_backend("reference"):
        plain = moved(x, rows, plan, [shared, residual])
        exact = moved(x.double(), rows.double(), plan, [shared.double(), residual.double()])
    assert torch.equal(found[0], plain[0])
    for actual, close, right in zip(found, plain, exact, strict=True):
        assert actual.dtype == close.dtype
        assert_as_accurate(actual, close, right)


def on(device: str, plan: mk.RoutingPlan) -> mk.RoutingPlan:
    """A plan of the reference, on another device."""
    fields = {
        name: value.detach().to(device) if isinstance(value, Tensor) else value
        for name, value in vars(plan).items()
    }
    return mk.RoutingPlan(**fields)


def plans(device: str, tokens: int, experts: int) -> list[mk.RoutingPlan]:
    """Ragged and equal rows, some tokens with none; made by the reference."""
    logits = make_logits(tokens, experts).to(device)
    return [
        mk.token_choice(logits, 3, backend="reference"),
        mk.expert_choice(logits, 1.5, num_groups=2, backend="reference"),
    ]


@pytest.mark.parametrize("device", CUDA_DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_moved_and_combined(device, dtype):
    for plan in plans(device, 1000 if device == "cuda" else 20, 5):
        for width in (1, 7, 8, 129, 1152) if device == "cuda" else (7, 24):
            check_rows_are_moved(device, plan, width, dtype)


@pytest.mark.parametrize("device", CUDA_DEVICES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_floats_are_rounded_to_16_bits_as_pytorch_does(device, dtype):
    """Every 16-bit number, the middle between it and the next, and the floats next to these."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    numbers = numbers[numbers.isfinite()]
    following = (numbers.to(dtype).view(torch.int16) + 1).view(dtype).float()
    middles = torch.where(following.isfinite(), (numbers.double() + following) / 2, 0).float()
    edges = torch.tensor([torch.finfo(dtype).max, 65520.0, 3.4e38, 1e-45, 2.0**-25, INF, NAN])
    floats = torch.cat([numbers, middles, edges]).view(torch.int32)
    floats = torch.cat([floats - 1, floats, floats + 1]).view(torch.float32)
    one = torch.ones(1, 1, dtype=dtype, device=device)
    first = torch.zeros(floats.shape[0], dtype=torch.int32, device=device)
    rows, _ = ops.gather.cuda(one, first, floats.to(device), None)
    expected = floats.to(dtype)[:, None]
    torch.testing.assert_close(rows.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", CUDA_DEVICES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_number_becomes_the_float_that_it_is(device, dtype):
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    tokens = torch.arange(1 << 16, dtype=torch.int32, device=device)
    weights = torch.ones(1 << 16, device=device)
    ones = torch.ones(1 << 16, 1, dtype=dtype, device=device)
    rows, widened = ops.gather.cuda(numbers[:, None], tokens, weights, ones)
    torch.testing.assert_close(widened, numbers.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rows[:, 0], numbers, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_rows_beyond_32_bit_addresses(unpoisoned):
    require_memory(16)
    tokens, width = 1000, 4096
    num_rows = 2**31 // width + 1003
    token_indices = torch.arange(num_rows, dtype=torch.int32, device="cuda") % tokens
    x = draw("cuda", tokens, width, dtype=torch.bfloat16)
    weights = torch.rand(num_rows, device="cuda")
    rows, _ = ops.gather.cuda(x, token_indices, None, None)
    scaled, dweights = ops.gather.cuda(x, token_indices, weights, rows)
    for part in (slice(0, 64), slice(-64, None)):
        source = x[token_indices[part].long()]
        assert torch.equal(rows[part], source)
        assert torch.equal(scaled[part], (weights[part, None] * source.float()).bfloat16())
        exact = source.double().square().sum(1)
        assert relative_error(dweights[part], exact) < 1e-5
    row_indices = token_indices.argsort(stable=True).int()
    counts = token_indices.long().bincount(minlength=tokens)
    row_offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    out = ops.sum_rows.cuda(rows, weights, row_indices, row_offsets)
    for token in (0, tokens - 1):
        mine = row_indices[row_offsets[token] : row_offsets[token + 1]].long()
        assert int(mine[-1]) * width > 2**31
        assert relative_error(out[token], weights[mine].double().sum() * x[token].double()) < 1e-2


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("route", ["token_choice", "expert_choice"])
@pytest.mark.parametrize("device", CUDA_DEVICES)
def test_non_finite_logits_are_refused_when_asked(device, value, route):
    logits = make_logits(70, 3)
    logits[37, 1] = value
    with pytest.raises(ValueError, match=r"1 non-finite of 210 values, the first .* \(37, 1\)"):
        getattr(mk, route)(logits.to(device), check_finite=True)
    getattr(mk, route)(logits.to(device), check_finite=False)
    getattr(mk, route)(make_logits(70, 3).to(device), check_finite=True)


def spaced_logits(tokens: int, experts: int) -> Tensor:
    """Evenly spaced numbers in -4 ... 4, mixed: no rounding changes which of two is the larger."""
    order = torch.randperm(tokens * experts)
    return torch.linspace(-4, 4, tokens * experts)[order].view(tokens, experts)


def routed(route: Callable[[Tensor], mk.RoutingPlan], logits: Tensor) -> list[Tensor]:
    """Indices, and weights, losses and the gradient, on the CPU; nothing else runs on a GPU."""
    leaf = logits.requires_grad_()
    plan = route(leaf)
    values = [plan.routing_weights, mk.load_balance_loss(plan), mk.router_z_loss(plan)]
    upstream = [torch.linspace(-1, 2, v.numel()).cos().view_as(v.cpu()).to(v) for v in values]
    indices = [plan.token_indices, plan.row_indices, plan.row_offsets, plan.expert_offsets]
    if plan.expert_indices is not None:
        indices.append(plan.expert_indices)
    found = [*indices, *values, *torch.autograd.grad(values, leaf, upstream)]
    return [tensor.detach().cpu() for tensor in found]


def check_small(route: Callable[[Tensor], mk.RoutingPlan], logits: Tensor, device: str) -> None:
    found = routed(route, logits.to(device, copy=True))
    with mk.use_backend("reference"):
        plain, exact = routed(route, logits.clone()), routed(route, logits.double())
    for actual, close, right in zip(found, plain, exact, strict=True):
        if actual.is_floating_point():
            assert_as_accurate(actual, close, right)
        else:
            assert torch.equal(actual, close)


SMALL_POOLS = ((40, 3, 2, 7, "none"), (97, 5, 1, 30, "per_token"), (1030, 2, 1, 300, "none"))


@pytest.mark.parametrize("device", CUDA_DEVICES)
@pytest.mark.parametrize("team", TEAMS)
def test_small_expert_choice(unpoisoned, device, team, monkeypatch):
    monkeypatch.setattr(cuda_route, "TEAM", TEAMS[team])
    pools = SMALL_POOLS if team != "automatic" else (*SMALL_POOLS, (33, 130, 1, 4, "per_token"))
    for size, experts, groups, capacity, normalize in pools:
        route = partial(
            mk.expert_choice,
            capacity=capacity,
            num_groups=groups,
            affinity="sigmoid",
            normalize=normalize,
            check_finite=False,
        )
        check_small(route, spaced_logits(groups * size, experts), device)


@pytest.mark.parametrize("device", CUDA_DEVICES)
@pytest.mark.parametrize(
    ("experts", "options"),
    [
        (5, {"top_k": 2}),
        (40, {"top_k": 6, "normalize": "per_token", "num_groups": 3}),
        (16, {"top_k": 2, "num_expert_groups": 4, "top_k_groups": 2, "affinity": "sigmoid"}),
        (130, {"top_k": 3, "scale": 2.5}),
    ],
    ids=str,
)
def test_small_token_choice(unpoisoned, device, experts, options):
    route = partial(mk.token_choice, **options, check_finite=False)
    check_small(route, spaced_logits(99, experts), device)


@pytest.mark.parametrize("device", CUDA_DEVICES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_small_rows(unpoisoned, device, dtype):
    for plan in plans("cpu", 20, 5):
        for width in (7, 24):
            check_rows_are_moved(device, plan, width, dtype)
