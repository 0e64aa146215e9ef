"""Tensors of more than 2^31 elements: the kernels' addresses, without their memory.

The tensors lie in address space that is reserved but never filled; a kernel reads and writes a few
rows behind element 2^31. In front of each lies as much again, so that an offset that wrapped around
at 32 bits meets zeros there, and the test fails instead of the process. Triton's interpreter takes
CPU storages as they are, without a copy.
"""

import math
import mmap
import os
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.backends import BACKENDS

if (reason := BACKENDS["triton"].why_not("expert_mlp", "cpu")) is not None:
    pytest.skip(f"the triton backend {reason}", allow_module_level=True)

from moe_kernels.backends.triton import configs, gemm_launch
from moe_kernels.backends.triton.config_table import Config
from moe_kernels.backends.triton.down_bwd import down_bwd
from moe_kernels.backends.triton.launch import Target
from moe_kernels.backends.triton.rows import gather, sum_rows
from moe_kernels.backends.triton.rows_gemm import rows_gemm
from moe_kernels.backends.triton.up_fwd import up_fwd
from moe_kernels.backends.triton.weight_bwd import bias_bwd, weight_bwd

MAP_NORESERVE = 0x4000  # Linux; mmap.MAP_NORESERVE from Python 3.13 on
WRAP = 1 << 31
WIDTH = 64
ROWS = WRAP // WIDTH + 8  # of a tensor with WIDTH columns
LAST = ROWS - 5  # the first of the rows that are used: element 2^31 + 192
FREE, ALLOWED = 2 << 30, 500 << 20  # bytes


def free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reserve(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Zeros that take no memory until they are written."""
    before = WRAP if math.prod(shape) > WRAP else 0
    count = before + math.prod(shape)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"this system reserves no address space ahead of use ({error})")
    return torch.frombuffer(memory, dtype=dtype, count=count)[before:].view(shape)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of filling large memory, hand out such that is reserved only."""
    plain = Tensor.new_empty

    def new_empty(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        sizes = shape if isinstance(shape[0], int) else shape[0]
        if math.prod(sizes) < WRAP // WIDTH:
            return plain(self, *shape, **options)
        assert not options
        return reserve(*sizes, dtype=self.dtype)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)


@pytest.fixture(autouse=True)
def backend(poison_uninitialised_memory: None) -> Iterator[str]:
    if free_memory() < FREE:
        pytest.skip(f"needs {FREE >> 30} GiB of free memory")
    now, highest = resident(), peak()
    with mk.use_backend("triton"), configs.forced(Config(16, 64, 64, 4, 1)):
        yield "triton"
    assert max(resident() - now, peak() - highest) < ALLOWED


@pytest.fixture(params=["pointers", "descriptors"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How the products read their operands."""
    descriptors = request.param == "descriptors"
    target = Target("interpreter", processors=2, descriptors=descriptors)
    monkeypatch.setattr(gemm_launch, "target_of", lambda tensor: target)
    with configs.forced(Config(16, 64, 64, 4, 1, persistent=True)):
        yield request.param


def randn(*shape: int) -> Tensor:
    return (torch.randn(*shape) * 0.2).half()


def rows_with(values: Tensor) -> Tensor:
    """(ROWS, columns) with ``values`` at rows ``LAST`` and on."""
    tensor = reserve(ROWS, values.shape[1])
    tensor[LAST : LAST + values.shape[0]] = values
    return tensor


def offsets(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def test_gather_reads_tokens_behind_the_limit():
    values = randn(3, WIDTH)
    tokens = offsets(LAST + 2, 0, LAST, LAST + 1)
    rows, _ = gather(rows_with(values), tokens, None, None)
    assert torch.equal(rows, torch.stack([values[2], torch.zeros(WIDTH).half(), *values[:2]]))


def test_sum_rows_reads_rows_and_weights_behind_the_limit():
    values, weights = randn(3, WIDTH), reserve(ROWS, dtype=torch.float32)
    weights[LAST : LAST + 3] = torch.tensor([0.5, 2.0, -1.0])
    rows, indices = rows_with(values), offsets(LAST, LAST + 1, LAST + 2)
    out = sum_rows(rows, None, indices, offsets(0, 2, 3))
    small = sum_rows(values, None, offsets(0, 1, 2), offsets(0, 2, 3))
    assert torch.equal(out, small)
    weighted = sum_rows(rows, weights, indices, offsets(0, 2, 3))
    expected = torch.stack([values[0].float() * 0.5 + values[1].float() * 2, -values[2].float()])
    assert torch.equal(weighted, expected.half())


def test_experts_behind_the_limit_are_read(source):
    """Matrices of more than 2^31 elements, of whose experts the last alone has rows."""
    experts, width = 2049, 1024
    x, w_in, w_out = randn(3, width), randn(1, width, width), randn(1, width, width)
    plan = mk.token_choice(torch.zeros(3, 1), 1, backend="reference")
    expected = run_experts(x, w_in, w_out, plan.expert_offsets)
    large = [reserve(experts, width, width) for _ in range(2)]
    for tensor, matrix in zip(large, (w_in, w_out), strict=True):
        assert tensor.numel() > WRAP
        tensor[-1] = matrix[0]
    starts = torch.zeros(experts + 1, dtype=torch.int32)
    starts[-1] = 3
    found = run_experts(x, *large, starts)
    for a, b in zip(found, expected, strict=True):
        assert bool((b != 0).any())
        assert torch.equal(a, b)


def run_experts(x: Tensor, w_in: Tensor, w_out: Tensor, starts: Tensor) -> list[Tensor]:
    inner, tokens, weights = w_out.shape[2], offsets(0, 1, 2), torch.full((3,), 0.5)
    h, a = up_fwd(x, w_in, None, tokens, starts, 0, inner, "gelu")
    y = rows_gemm(a, w_out, starts, 0, transposed=True)
    dh, _, _ = down_bwd(
        y, h, weights, w_out, None, None, tokens, starts, 0, "gelu",
        store_a=True, gate_gradient=False,
    )  # fmt: skip
    return [h, a, y, dh, rows_gemm(dh, w_in, starts, 0, transposed=False)]


def both(run: Callable[[int], list[Tensor]]) -> None:
    """Compare the used rows of a run on huge tensors with those of the same on small ones."""
    for a, b in zip(run(LAST), run(0), strict=True):
        assert bool((b != 0).any())
        assert torch.equal(a, b)


def test_products_read_and_write_rows_behind_the_limit(source):
    """Offsets that start at row LAST: nobody owns the rows before."""
    x, w_in, w_out = randn(3, WIDTH), randn(2, 2 * WIDTH, WIDTH), randn(2, WIDTH, WIDTH)
    dout, gates = randn(3, WIDTH), torch.rand(3)

    def run(first: int) -> list[Tensor]:
        starts = offsets(first, first + 1, first + 3)
        used = slice(first, first + 3)
        tokens, weights = torch.zeros(3, dtype=torch.int32), gates
        upstream, source = dout, x
        if first:
            tokens, weights = reserve(ROWS, dtype=torch.int32), reserve(ROWS, dtype=torch.float32)
            upstream, source = rows_with(dout), rows_with(x)
            weights[used] = gates
        tokens[used] = offsets(first, first + 2, first + 1)
        h, a = up_fwd(source, w_in, None, tokens, starts, 0, WIDTH, "swiglu")
        y = rows_gemm(a, w_out, starts, 0, transposed=True)
        dh, scaled, _ = down_bwd(
            upstream, h, weights, w_out, None, None, tokens, starts, 0, "swiglu",
            store_a=True, gate_gradient=False,
        )  # fmt: skip
        assert scaled is not None
        drows = rows_gemm(dh, w_in, starts, 0, transposed=False)
        if first:
            assert min(t.numel() for t in (source, h, a, y, dh, scaled, drows)) > WRAP
        dw = weight_bwd(dh, source, starts, 0, token_indices=tokens, gather="q")
        dw_out = weight_bwd(upstream, scaled, starts, 0, token_indices=tokens, gather="p")
        biases = [
            bias_bwd(dh, randn(2, 2 * WIDTH), starts, 0),
            bias_bwd(upstream, randn(2, WIDTH), starts, 0, weights=weights, token_indices=tokens),
        ]
        return [*(t[used] for t in (h, a, y, dh, scaled, drows)), dw, dw_out, *biases]

    both(run)
