"""Kernels for ``test_triton_check``, good and bad; as a program it prints findings as JSON.

A program of its own, because a test session may have TRITON_INTERPRET set, and then nothing here
would be compiled.
"""

import json
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from benchmarks.triton_check.addresses import overflows
from benchmarks.triton_check.build import build
from benchmarks.triton_check.cases import Case
from benchmarks.triton_check.record import grid_problem
from benchmarks.triton_check.rules import broken, row_of
from benchmarks.triton_check.specialize import specialize
from benchmarks.triton_check.targets import GPUS
from moe_kernels.backends.triton.launch import Target, launch, recorded

TOY, FITS, SPILLS, SHARED = (Case(op, "") for op in ("toy", "fits", "spills", "shared"))
TOKENS, HIDDEN = 1 << 21, 1152  # 2.4e9 elements


@triton.jit
def rows_wide(x_ptr, index_ptr, out_ptr, num_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(index_ptr + row).to(tl.int64)
    value = tl.load(x_ptr + token * SIZE + column, mask=column < SIZE)
    tl.store(out_ptr + row * SIZE + column, value, mask=column < SIZE)


@triton.jit
def rows_narrow(x_ptr, index_ptr, out_ptr, num_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(index_ptr + row)
    value = tl.load(x_ptr + token * SIZE + column, mask=column < SIZE)
    tl.store(out_ptr + row * SIZE + column, value, mask=column < SIZE)


@triton.jit
def flat_narrow(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(x_ptr + place, mask=place < size), mask=place < size)


@triton.jit
def carried_narrow(x_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, SIZE, BLOCK):
        total += tl.load(x_ptr + place + tl.arange(0, BLOCK))
        place += BLOCK
    tl.store(out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def product(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    rows, columns, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, 64)
    total = tl.zeros((M, N), tl.float32)
    for first in range(0, SIZE, 64):
        a = tl.load(a_ptr + rows[:, None] * SIZE + first + k[None, :])
        b = tl.load(b_ptr + (first + k)[:, None] * N + columns[None, :])
        total = tl.dot(a, b, total)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], total)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def record(kernel, grid, *args, **settings):
    with recorded(Target("sm_90", 132, True)) as launches:
        launch(kernel, grid, *args, **settings)
    return launches[0]


def addresses() -> dict[str, list[str]]:
    """Overflows of each kernel by name."""
    x = meta(TOKENS, HIDDEN)
    index = meta(TOKENS, dtype=torch.int32)
    grid = (TOKENS, triton.cdiv(HIDDEN, 256))
    gathers = [
        record(kernel, grid, x, index, x, TOKENS, SIZE=HIDDEN, BLOCK=256)
        for kernel in (rows_wide, rows_narrow)
    ]
    blocks = triton.cdiv(x.numel(), 1024)
    others = [
        record(flat_narrow, (blocks,), x, x, x.numel(), BLOCK=1024),
        record(carried_narrow, (TOKENS,), x, meta(TOKENS, 64), SIZE=HIDDEN, BLOCK=64),
    ]
    return {
        found.kernel.__name__: [
            str(overflow)
            for overflow in overflows(found, specialize(found, GPUS["sm_90"], TOY), TOKENS)
        ]
        for found in (*gathers, *others)
    }


def binaries() -> list[dict]:
    """Figures and broken rules of a product that fits and of one that does not."""
    fitting = {"SIZE": 512, "M": 64, "N": 64, "num_stages": 2}
    operands = [meta(256, 512, dtype=torch.bfloat16), meta(512, 256, dtype=torch.bfloat16)]
    out = meta(256, 256)
    compilations = []
    for gpu in GPUS.values():
        found = record(product, (1,), *operands, out, **fitting)
        compilations.append(specialize(found, gpu, FITS))
    spilling = {"SIZE": 512, "M": 256, "N": 256, "num_warps": 4, "num_stages": 2}
    found = record(product, (1,), *operands, out, **spilling)
    compilations.append(specialize(found, GPUS["sm_80"], SPILLS))
    large = {"SIZE": 512, "M": 128, "N": 256, "num_warps": 8, "num_stages": 6}
    found = record(product, (1,), *operands, out, **large)
    compilations.append(specialize(found, GPUS["sm_80"], SHARED))
    results = []
    for built in build(compilations, jobs=2):
        row = row_of(built) if built.figures else None
        results.append(
            {
                "arch": built.compilation.arch,
                "case": built.compilation.case.op,
                "error": built.error,
                "figures": asdict(built.figures) if built.figures else {},
                "broken": broken(row) if row else [],
            }
        )
    return results


def types() -> dict[str, str]:
    """What the compiler is told of arguments of every kind."""
    x = meta(64, 1152, dtype=torch.bfloat16)
    unaligned = meta(100, dtype=torch.int32)[1:]
    found = record(rows_wide, (1,), x, unaligned, None, 48, SIZE=1152, BLOCK=64)
    return specialize(found, GPUS["sm_90"], TOY).types


def grids() -> list[str | None]:
    x = meta(4)
    return [
        grid_problem(record(flat_narrow, grid, x, x, 4, BLOCK=64))
        for grid in ((1 << 20, 65535), (1, 65536), (1 << 31,))
    ]


if __name__ == "__main__":
    print(json.dumps([addresses(), binaries(), types(), grids()]))
