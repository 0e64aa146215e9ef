"""Time, memory and graph breaks of a block, original and swapped, interleaved."""

import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moe_kernels as mk
from benchmarks.environment import ROOT
from benchmarks.memory import resident_bytes, return_freed_memory
from benchmarks.ratios import quantile
from benchmarks.swap.blocks import Block
from benchmarks.timing import measure

MODES = ("forward", "both")


def pair(block: Block, device: torch.device) -> dict[str, nn.Module]:
    """The block, and a swapped copy whose results have been compared with it."""
    original = block.build().to(device)
    swapped = copy.deepcopy(original)
    mk.apply(swapped, verify=True)
    return {"original": original, "swapped": swapped}


def times(block: Block, tokens: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """Median seconds of both versions and their ratio, for each mode."""
    versions = pair(block, device)
    inputs = [tensor.to(device) for tensor in block.inputs(tokens)]
    found: dict[str, Any] = {}
    for mode in MODES:
        samplers = {
            name: _sampler(module.train(mode == "both"), inputs, mode, device)
            for name, module in versions.items()
        }
        samples = measure(samplers, repeats=1000, seconds=seconds)
        medians = {name: quantile(values, 0.5) for name, values in samples.items()}
        pairs = zip(samples["original"], samples["swapped"], strict=True)
        ratio = quantile([before / after for before, after in pairs], 0.5)
        found[mode] = {**medians, "ratio": ratio, "rounds": len(samples["swapped"])}
    return found


def step(module: nn.Module, inputs: list[Tensor], upstream: Tensor) -> None:
    """Forward and backward to every parameter and floating input."""
    output = module(*inputs)
    leaves = [leaf for leaf in (*inputs, *module.parameters()) if leaf.requires_grad]
    torch.autograd.grad(_tensor(output), leaves, upstream, allow_unused=True)


def graph_breaks(block: Block, tokens: int = 64) -> dict[str, int]:
    """Graph breaks that torch.compile meets in training."""
    inputs = list(block.inputs(tokens))
    found = {}
    for name, module in pair(block, torch.device("cpu")).items():
        torch._dynamo.reset()
        found[name] = torch._dynamo.explain(module.train())(*inputs).graph_break_count
    return found


def memory(block: Block, tokens: int, device: torch.device) -> dict[str, Any]:
    """Extra bytes of one training step of either version: on a CPU, each in a process of its own.

    ``saved``: kept between forward and backward, which a deep network holds for every block;
    ``peak``: at any time, the gradients of the weights included.
    """
    found: dict[str, Any] = {}
    for name in ("original", "swapped"):
        if device.type == "cuda":
            found[name] = _growth_on_gpu(block, name, tokens, device)
            continue
        command = (sys.executable, "-m", "benchmarks.swap.measure", block.name, name, str(tokens))
        # Memory that the kernels keep from call to call would hide what the second step takes.
        alone = {**os.environ, "MOE_KERNELS_KEEP_MB": "0"}
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, env=alone
        )
        found[name] = json.loads(result.stdout.splitlines()[-1])
    for kind in ("saved", "peak"):
        found[f"{kind}_ratio"] = found["swapped"][kind] / found["original"][kind]
    return found


def _sampler(
    module: nn.Module, inputs: list[Tensor], mode: str, device: torch.device
) -> Callable[[int], float]:
    import time

    leaves = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    with torch.no_grad():
        upstream = torch.randn_like(_tensor(module(*leaves)))

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def sample(inner: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(inner):
            if mode == "forward":
                with torch.no_grad():
                    module(*leaves)
            else:
                step(module, leaves, upstream)
        wait()
        return time.perf_counter() - start

    return sample


def _tensor(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def _growth_on_gpu(block: Block, version: str, tokens: int, device: torch.device) -> dict[str, int]:
    """What PyTorch's allocator handed out in one training step."""
    module = block.build().train().to(device)
    if version == "swapped":
        mk.apply(module)
    inputs = [t.to(device).requires_grad_(t.is_floating_point()) for t in block.inputs(tokens)]
    upstream = torch.randn(inputs[0].shape, device=device)
    leaves = [leaf for leaf in (*inputs, *module.parameters()) if leaf.requires_grad]
    step(module, inputs, upstream)  # libraries and kernels are loaded
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    output = _tensor(module(*inputs))
    saved = torch.cuda.memory_allocated(device) - before
    torch.autograd.grad(output, leaves, upstream, allow_unused=True)
    return {"saved": saved, "peak": torch.cuda.max_memory_allocated(device) - before}


def _growth(block: Block, version: str, tokens: int) -> dict[str, int]:
    """Growth of this fresh process by one training step."""
    module = block.build().train()
    if version == "swapped":
        mk.apply(module)
    found = {}
    for count in (8, tokens):  # a tiny step first, so that libraries and threads are there
        inputs = [t.requires_grad_(t.is_floating_point()) for t in block.inputs(count)]
        upstream = torch.randn(inputs[0].shape)
        leaves = [leaf for leaf in (*inputs, *module.parameters()) if leaf.requires_grad]
        gc.collect()
        return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = resident_bytes("VmRSS")
        output = _tensor(module(*inputs))
        found["saved"] = resident_bytes("VmRSS") - before
        torch.autograd.grad(output, leaves, upstream, allow_unused=True)
        found["peak"] = resident_bytes("VmHWM") - before
        del output
    return found


if __name__ == "__main__":
    from benchmarks.swap.blocks import BLOCKS

    _name, _version, _count = sys.argv[1:]
    _block = next(block for block in BLOCKS if block.name == _name)
    print(json.dumps(_growth(_block, _version, int(_count))))
