"""From cases to compilations: launches are recorded for a target, and equal ones dropped."""

import importlib
from collections.abc import Callable, Iterable, Iterator

import torch

from benchmarks.triton_check.build import summary
from benchmarks.triton_check.calls import CALLS, call
from benchmarks.triton_check.cases import Case
from benchmarks.triton_check.specialize import Compilation, specialize
from benchmarks.triton_check.targets import GPUS, Gpu
from moe_kernels.backends.triton.configs import shipped
from moe_kernels.backends.triton.launch import Launch, Target, recorded

OTHER_DTYPE_TARGETS = ("sm_80", "sm_90")  # that OTHER_DTYPES are compiled for
GRID_LIMITS = (2**31 - 1, 65535, 65535)


def missing_ops() -> list[str]:
    """Ops of the cases that the backend has no kernel for."""
    importlib.import_module("moe_kernels.backends.triton")  # gives the ops their kernels
    return [name for name, (operator, _) in CALLS.items() if "triton" not in operator.variants]


def launches(case: Case, gpu: Gpu) -> list[Launch]:
    """What the case would launch on ``gpu``."""
    with recorded(Target(gpu.arch, gpu.processors, gpu.descriptors)) as found:
        call(case)
    return found


def collect(
    cases: Iterable[Case], arch: str, on_error: Callable[[str], None]
) -> Iterator[tuple[Launch, Compilation]]:
    """Every different compilation of the cases for ``arch``, with a launch that needs it."""
    gpu, seen = GPUS[arch], set()
    for case in cases:
        try:
            found = [(launch, specialize(launch, gpu, case)) for launch in launches(case, gpu)]
        except Exception as error:  # a launcher that fails is a finding, the other cases go on
            on_error(f"{case.name} on {arch}: {summary(error)}")
            continue
        for launch, compilation in found:
            if compilation.key not in seen:
                seen.add(compilation.key)
                yield launch, compilation


def grid_problem(launch: Launch) -> str | None:
    """Say which dimension of the grid no GPU takes."""
    for axis, size, limit in zip("xyz", launch.grid, GRID_LIMITS, strict=False):
        if size > limit:
            return f"{launch.kernel.__name__}: grid {axis} is {size:,}, above {limit:,}"
    return None


def unused_configs(compilations: Iterable[Compilation]) -> list[str]:
    """Shipped configs that no case launches, so that nothing would be known of them."""
    launched = {
        (c.arch, *(int(c.constants[f"BLOCK_{axis}"]) for axis in "MNK"), c.num_warps, c.num_stages)
        for c in compilations
        if {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= set(c.constants)
    }
    return [
        f"{arch}: shipped config {product}/{bucket} for {dtype} is launched by no case"
        for arch in GPUS
        for dtype in (torch.bfloat16, torch.float32)
        if dtype == torch.bfloat16 or arch in OTHER_DTYPE_TARGETS
        for product, buckets in shipped(arch, dtype).items()
        for bucket, config in buckets.items()
        if (arch, config.block_m, config.block_n, config.block_k, config.num_warps,
            config.num_stages) not in launched
    ]  # fmt: skip
