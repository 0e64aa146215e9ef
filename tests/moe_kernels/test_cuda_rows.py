"""Dispatch and combine in CUDA C++, on a simulated GPU: moved bits, sums, gradients, edges."""

import dataclasses
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.testing import assert_as_accurate, make_logits

if (reason := BACKENDS["cuda"].why_not("combine", "cpu")) is not None:
    pytest.skip(f"the cuda backend {reason}", allow_module_level=True)

from moe_kernels.backends.cuda.native import DTYPES, native

ops = torch.ops.moe_kernels
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
HALVES = (torch.bfloat16, torch.float16)
WIDTHS = (1, 7, 8, 24, 129, 1152)
# How many rows each token has.
COUNTS = {
    "mixed": (0, 1, 2, 5, 2, 0, 3, 1, 1, 1, 2, 2, 1, 4),
    "one token": (0, 0, 9, 0),
    "no rows": (0, 0, 0),
    "no tokens": (),
}


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    torch._dynamo.reset()
    native.simulate()
    with mk.use_backend("cuda"):
        yield "cuda"
    native.simulate()


each_dtype = pytest.mark.parametrize("dtype", BITS, ids=str)
each_width = pytest.mark.parametrize("width", WIDTHS)
each_count = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def random_bits(*shape: int, dtype: torch.dtype) -> Tensor:
    """Any numbers at all, NaN with payloads too."""
    limits = torch.iinfo(BITS[dtype])
    return torch.randint(limits.min, limits.max, shape, dtype=BITS[dtype]).view(dtype)


def assignment(counts: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """token_indices, row_indices and row_offsets of tokens with so many rows, mixed."""
    rows = torch.tensor(counts, dtype=torch.int64)
    tokens = torch.arange(len(counts)).repeat_interleave(rows)
    tokens = tokens[torch.randperm(tokens.shape[0])]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), rows.cumsum(0)])
    return tokens.int(), tokens.argsort(stable=True).int(), offsets.int()


def unaligned(tensor: Tensor) -> Tensor:
    """The same numbers, at an address that is no multiple of 16."""
    copy = tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape)
    copy.copy_(tensor)
    assert copy.is_contiguous()
    assert copy.data_ptr() % 16 != 0
    return copy


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    bits = BITS[actual.dtype]
    assert torch.equal(actual.view(bits), expected.view(bits))


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Equal numbers; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def plain_sum(
    rows: Tensor,
    weights: Tensor | None,
    token_indices: Tensor,
    tokens: int,
    terms: tuple[Tensor | None, ...],
    wide: torch.dtype,
) -> Tensor:
    """What ``sum_rows`` and ``combine`` compute, in PyTorch and ``wide``."""
    scaled = rows.to(wide) if weights is None else weights.to(wide)[:, None] * rows.to(wide)
    out = torch.zeros(tokens, rows.shape[1], dtype=wide).index_add(0, token_indices, scaled)
    for term in terms:
        out = out if term is None else out + term.to(wide)
    return out


@each_dtype
@each_width
@each_count
def test_gather_moves_bits(counts, width, dtype):
    token_indices, _, _ = assignment(counts)
    x = random_bits(len(counts), width, dtype=dtype)
    expected = x[token_indices.long()]
    for source in (x, unaligned(x)) if counts else (x,):
        rows, dweights = ops.gather.cuda(source, token_indices, None, None)
        assert_same_bits(rows, expected)
        assert dweights.shape == (0,)


@each_dtype
@each_width
@each_count
def test_gather_scales_rows_and_multiplies_them_with_values(counts, width, dtype):
    token_indices, _, _ = assignment(counts)
    num_rows = token_indices.shape[0]
    x, values = randn(len(counts), width, dtype=dtype), randn(num_rows, width, dtype=dtype)
    weights = torch.randn(num_rows)
    moved = x[token_indices.long()]
    rows, dweights = ops.gather.cuda(x, token_indices, weights, values)
    assert_same_bits(rows, (weights[:, None] * moved.float()).to(dtype))
    plain = torch.einsum("rd,rd->r", moved.float(), values.float())
    exact = torch.einsum("rd,rd->r", moved.double(), values.double())
    assert dweights.dtype == torch.float32
    assert_as_accurate(dweights, plain, exact)
    scaled, none = ops.gather.cuda(x, token_indices, weights, None)
    assert_same_bits(scaled, rows)
    assert none.shape == (0,)
    if num_rows:
        slow = ops.gather.cuda(unaligned(x), token_indices, unaligned(weights), unaligned(values))
        assert_same_bits(slow[0], rows)
        assert_as_accurate(slow[1], plain, exact)


@each_dtype
@each_width
@each_count
def test_sums_are_as_accurate_as_plain_pytorch(counts, width, dtype):
    token_indices, *lists = assignment(counts)
    num_rows, tokens = token_indices.shape[0], len(counts)
    rows, weights = randn(num_rows, width, dtype=dtype), torch.rand(num_rows)
    shared, residual = (randn(tokens, width, dtype=dtype) for _ in range(2))

    def check(out: Tensor, weights: Tensor | None, *terms: Tensor | None) -> None:
        plain, exact = (
            plain_sum(rows, weights, token_indices, tokens, terms, wide)
            for wide in (torch.float32, torch.float64)
        )
        assert out.dtype == dtype
        assert_as_accurate(out, plain.to(dtype), exact)

    out = ops.sum_rows.cuda(rows, None, *lists)
    check(out, None)
    empty = torch.tensor(counts) == 0
    assert torch.equal(out[empty], torch.zeros(int(empty.sum()), width, dtype=dtype))
    check(ops.sum_rows.cuda(rows, weights, *lists), weights)
    for terms in ((None, None), (shared, None), (None, residual), (shared, residual)):
        out = ops.combine.cuda(rows, weights, *terms, token_indices, *lists)
        check(out, weights, *terms)
        plain = plain_sum(rows, weights, token_indices, tokens, terms, torch.float32)
        assert torch.equal(out[empty], plain.to(dtype)[empty])
        if num_rows:
            views = (unaligned(rows), weights, *(t if t is None else unaligned(t) for t in terms))
            assert_same_bits(ops.combine.cuda(*views, token_indices, *lists), out)


def csr(rows: list[int], *offsets: int) -> tuple[Tensor, Tensor]:
    """row_indices and row_offsets."""
    return torch.tensor(rows, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32)


@each_dtype
def test_terms_are_added_in_their_order(dtype):
    """2^-12 + 2^12 is 2^12 in fp32: in any other order another number remains."""
    rows = torch.tensor([4096.0, 1.0, -4096.0])[:, None].expand(3, 8).to(dtype)
    weights = torch.tensor([1.0, 2.0**-12, 1.0])
    assert ops.sum_rows.cuda(rows, weights, *csr([0, 1, 2], 0, 3)).unique().tolist() == [0]
    assert ops.sum_rows.cuda(rows, weights, *csr([0, 2, 1], 0, 3)).unique().tolist() == [2.0**-12]
    token, one = torch.zeros(3, dtype=torch.int32), csr([1], 0, 1)
    out = ops.combine.cuda(rows, weights, rows[:1], rows[2:], token, *one)
    assert out.unique().tolist() == [0]
    out = ops.combine.cuda(rows[1:], weights[1:], rows[:1], None, token, *csr([0, 1], 0, 2))
    assert out.unique().tolist() == [2.0**-12]


@each_dtype
def test_weights_that_are_nan_zero_or_infinite(dtype):
    special = [float("nan"), 0.0, float("inf"), -float("inf"), -0.0, 1.0, 1e-40, 3e38]
    rows = torch.tensor([*special[:7], -2.0]).to(dtype).repeat(8, 1)  # every pair occurs
    weights = torch.tensor(special)
    tokens = torch.arange(8, dtype=torch.int32)
    products = (weights[:, None] * rows.float()).to(dtype)
    assert_equal(ops.gather.cuda(rows, tokens, weights, None)[0], products)
    starts = torch.arange(9, dtype=torch.int32)
    assert_equal(ops.sum_rows.cuda(rows, weights, tokens, starts), products)
    _, dweights = ops.gather.cuda(rows, tokens, weights, rows.new_ones(8, 8))
    assert bool(dweights.isnan().all())
    pairs = torch.arange(0, 9, 2, dtype=torch.int32)
    sums = (weights[:, None] * rows.float()).view(4, 2, 8).sum(1).to(dtype)
    assert_equal(ops.sum_rows.cuda(rows, weights, tokens, pairs), sums)


@each_dtype
def test_every_launch_and_every_order_of_threads_gives_the_same_bits(dtype):
    counts = COUNTS["mixed"] * 3
    token_indices, *lists = assignment(counts)
    num_rows = token_indices.shape[0]
    x, rows = randn(len(counts), 136, dtype=dtype), randn(num_rows, 136, dtype=dtype)
    weights = torch.randn(num_rows)

    def results() -> list[Tensor]:
        return [
            ops.gather.cuda(x, token_indices, None, None)[0],
            *ops.gather.cuda(x, token_indices, weights, rows),
            ops.combine.cuda(rows, weights, x, None, token_indices, *lists),
        ]

    expected = results()
    options: list[dict[str, int]] = [{}, {"order": 1}, {"order": 2, "seed": 5}]
    options += [{"processors": 1}, {"processors": 7, "blocks_per_processor": 4}]
    for option in options:
        native.simulate(**option)
        for actual, other in zip(results(), expected, strict=True):
            assert_same_bits(actual, other)


def test_nothing_is_launched_for_nothing():
    indices, *lists = assignment(())
    nothing, rows = torch.zeros(0, 8), torch.zeros(0)
    before = native.launches()
    assert ops.dispatch.cuda(nothing, indices, *lists).shape == (0, 8)
    assert ops.combine.cuda(nothing, rows, nothing, None, indices, *lists).shape == (0, 8)
    assert native.launches() == before
    indices, *lists = assignment(COUNTS["mixed"])
    x, values = torch.zeros(14, 0), torch.zeros(indices.shape[0], 0)
    weights = torch.ones(indices.shape[0])
    gathered, dweights = ops.gather.cuda(x, indices, weights, values)
    assert gathered.shape == values.shape
    assert torch.equal(dweights, torch.zeros_like(weights))
    assert ops.combine.cuda(values, weights, x, None, indices, *lists).shape == x.shape


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_16_bit_number_becomes_the_float_that_it_is(dtype):
    """A product with 1 is summed up in fp32, and stays so."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    x, ones = numbers[:, None].repeat(1, 8), numbers.new_zeros(numbers.shape[0], 8)
    ones[:, 3] = 1.0
    x[:, :3], x[:, 4:] = 0, 0
    tokens = torch.arange(numbers.shape[0], dtype=torch.int32)
    rows, widened = ops.gather.cuda(x, tokens, torch.ones(numbers.shape[0]), ones)
    assert_equal(widened, numbers.float())
    assert_equal(rows[:, 3], numbers)
    known = ~numbers.isnan()
    assert_same_bits(rows[known, 3], numbers[known])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_floats_are_rounded_to_16_bits_as_pytorch_does(dtype):
    """Every 16-bit number, the middle between it and the next, and the floats next to these."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    numbers = numbers[numbers.isfinite()]
    neighbours = (numbers.to(dtype).view(torch.int16) + 1).view(dtype).float()
    middles = torch.where(neighbours.isfinite(), (numbers.double() + neighbours) / 2, 0).float()
    floats = torch.cat([numbers, middles, random_bits(1 << 16, dtype=torch.float32)])
    floats = torch.cat(
        [(floats.view(torch.int32) + step).view(torch.float32) for step in (-1, 0, 1)]
    )
    largest = torch.finfo(dtype).max
    edges = [largest, 65519.996, 65520.0, 3.4e38, 1e-45, 2.0**-25, -(2.0**-25), float("inf")]
    floats = torch.cat([floats, torch.tensor(edges)])
    one = torch.ones(1, 1, dtype=dtype)
    rows, _ = ops.gather.cuda(one, torch.zeros(floats.shape[0], dtype=torch.int32), floats, None)
    expected = floats.to(dtype)[:, None]
    assert_equal(rows, expected)
    finite = ~expected.isnan()
    assert_same_bits(rows[finite], expected[finite])


def plan_of(kind: str) -> mk.RoutingPlan:
    logits = make_logits(12, 4)
    if kind == "token_choice":
        return mk.token_choice(logits, 2, backend="reference")
    return mk.expert_choice(logits, 1.5, num_groups=2, backend="reference")


each_kind = pytest.mark.parametrize("kind", ["token_choice", "expert_choice"])


def assert_gradients(run: Callable[[torch.dtype], list[Tensor]], dtype: torch.dtype) -> None:
    """Results of ``run`` on the CUDA kernels, against those of the reference."""
    actual = run(dtype)
    with mk.use_backend("reference"):
        plain, exact = run(dtype), run(torch.float64)
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert a.dtype == p.dtype
        assert_as_accurate(a, p, e)


@each_dtype
@each_kind
@pytest.mark.parametrize("width", [7, 24])
def test_dispatch_and_its_gradient(width, kind, dtype):
    plan = plan_of(kind)
    x, upstream = randn(12, width, dtype=dtype), randn(plan.num_rows, width, dtype=dtype)

    def run(to: torch.dtype) -> list[Tensor]:
        leaf = x.to(to).requires_grad_()
        rows = mk.dispatch(leaf, plan)
        return [rows.detach(), *torch.autograd.grad(rows, leaf, upstream.to(to))]

    assert_gradients(run, dtype)


@each_dtype
@each_kind
@pytest.mark.parametrize("width", [7, 24])
def test_combine_and_its_gradients(width, kind, dtype):
    plan = plan_of(kind)
    rows, upstream = randn(plan.num_rows, width, dtype=dtype), randn(12, width, dtype=dtype)
    terms = {name: randn(12, width, dtype=dtype) for name in ("shared", "residual")}

    def run(to: torch.dtype) -> list[Tensor]:
        wide = torch.float64 if to == torch.float64 else torch.float32
        weights = plan.routing_weights.detach().to(wide).requires_grad_()
        used = dataclasses.replace(plan, routing_weights=weights)
        leaf = rows.to(to).requires_grad_()
        leaves = {name: term.to(to).requires_grad_() for name, term in terms.items()}
        out = mk.combine(leaf, used, **leaves)
        inputs = [leaf, weights, *leaves.values()]
        return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(to))]

    assert_gradients(run, dtype)


def test_expanded_and_strided_tensors():
    plan = plan_of("token_choice")
    indices = (plan.token_indices, plan.row_indices, plan.row_offsets)
    weights = plan.routing_weights.detach()
    rows = torch.randn(plan.num_rows, 48)[:, ::2]
    x = torch.randn(24, 12).t()
    shared = torch.randn(24).expand(12, 24)
    strided = (rows, weights.repeat_interleave(2)[::2], shared, x, *indices)
    expected = ops.combine.cuda(*(t.clone(memory_format=torch.contiguous_format) for t in strided))
    assert torch.equal(ops.combine.cuda(*strided), expected)
    assert torch.equal(ops.dispatch.cuda(x, *indices), x[plan.token_indices.long()])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_terms_of_another_dtype_are_added_before_rounding(dtype):
    plan = plan_of("token_choice")
    rows, weights = randn(plan.num_rows, 8, dtype=dtype), plan.routing_weights.detach()
    indices = (plan.token_indices, plan.row_indices, plan.row_offsets)
    shared, residual = torch.randn(12, 8), randn(12, 8, dtype=dtype)
    out = ops.combine.cuda(rows, weights, shared, residual, *indices)
    wide = ops.combine.cuda(rows.float(), weights, shared, residual.float(), *indices)
    assert_same_bits(out, wide.to(dtype))


def samples(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    plan = plan_of("expert_choice")
    indices = (plan.token_indices, plan.row_indices, plan.row_offsets)
    weights = plan.routing_weights.detach()
    x, rows = randn(12, 9, dtype=dtype), randn(plan.num_rows, 9, dtype=dtype)
    yield "dispatch", (x.clone().requires_grad_(), *indices)
    for terms in ((None, None), (x, None), (x.clone().requires_grad_(), x)):
        leaves = rows.clone().requires_grad_(), weights.clone().requires_grad_()
        yield "combine", (*leaves, *terms, *indices)
    yield "gather", (x, indices[0], None, None)
    yield "gather", (x, indices[0], weights, None)
    yield "gather", (x, indices[0], weights, rows)
    yield "sum_rows", (rows, None, *indices[1:])
    yield "sum_rows", (rows, weights, *indices[1:])


@each_dtype
def test_opcheck(dtype):
    for name, args in samples(dtype):
        opcheck(getattr(ops, name).cuda, args)


def test_errors_say_what_was_given():
    plan = plan_of("token_choice")
    x, indices = torch.zeros(12, 8), plan.token_indices
    with pytest.raises(ValueError, match=r"token_indices of the plan has dtype torch.int64"):
        ops.gather.cuda(x, indices.long(), None, None)
    with pytest.raises(ValueError, match=r"row_offsets .* expected torch.int32"):
        ops.sum_rows.cuda(x, None, plan.row_indices, plan.row_offsets.long())
    with pytest.raises(ValueError, match=r"gather got dtype number 1; .* float32, bfloat16"):
        native.gather(0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 8)
    with pytest.raises(ValueError, match="2147483648 numbers; at most 1073741824"):
        native.sum_rows(0, 0, DTYPES[torch.float32], 0, 0, 0, 0, 0, 0, 0, 1, 1 << 31)


MAP_NORESERVE = 0x4000  # Linux; mmap.MAP_NORESERVE from Python 3.13 on
WRAP = 1 << 31


@pytest.mark.parametrize("width", [63, 64], ids=["single numbers", "16 bytes"])
def test_rows_behind_2_31_units_are_read(width):
    """In address space that is reserved and never filled, with zeros where an offset of 32 bits
    would end up."""
    units = width if width % 8 else width // 8
    count = WRAP // units + 8
    bytes_each = width * 2
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, 2 * count * bytes_each, flags=flags)
    except OSError as error:
        pytest.skip(f"this system reserves no address space ahead of use ({error})")
    both = torch.frombuffer(memory, dtype=torch.float16).view(2 * count, width)
    far, values = both[count:], torch.randn(3, width).half()
    far[-3:] = values
    last = torch.tensor([count - 1, 0, count - 3, count - 2], dtype=torch.int32)
    rows, _ = ops.gather.cuda(far, last, None, None)
    assert torch.equal(rows, torch.stack([values[2], torch.zeros(width).half(), *values[:2]]))
    starts = torch.tensor([0, 2, 4], dtype=torch.int32)
    sums = ops.sum_rows.cuda(far, None, last, starts)
    assert torch.equal(sums, torch.stack([values[2], values[0] + values[1]]))
