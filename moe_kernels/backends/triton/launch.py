"""How a kernel is started, on a GPU, in the interpreter, or not at all.

``launch`` is the only way in: it lets a compiler check collect every launch of a stage, with the
types of its arguments, on a machine without a GPU (``recorded``).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.backends.triton import requirements
from moe_kernels.ops.pack import PlanIndices

requirements.check()  # before the kernels: an older Triton fails on them with less helpful words

INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU
DEVICE_TYPES = ("cuda", "cpu") if INTERPRETED else ("cuda",)

# Given with every launch. Versions of Triton differ in the default: with fused multiply-adds an
# epilogue needs fewer instructions, and without saying so results would change with the version.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Target:
    """What the launchers know about a device.

    Attributes:
        arch: ``"sm_80"``, ``"gfx942"``, ...; ``"interpreter"`` on a CPU.
        processors: streaming multiprocessors or compute units.
        descriptors: whether it loads tiles by tensor descriptors (SM90 and newer).
    """

    arch: str
    processors: int
    descriptors: bool = False


@dataclass(frozen=True)
class Launch:
    """One recorded launch.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: programs in each dimension.
        args: arguments by name: tensors, numbers, tensor descriptors, ``None``.
        constants: ``tl.constexpr`` arguments by name.
        num_warps, num_stages: compile options.
        blocks: programs meant to run on a processor at once.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    blocks: int = 1


@dataclass
class _Recording:
    target: Target | None = None
    launches: list[Launch] = field(default_factory=list)


_recording: _Recording | None = None


@contextlib.contextmanager
def recorded(target: Target) -> Iterator[list[Launch]]:
    """Collect launches as ``target`` would get them instead of starting them.

    Tensors may be on the meta device; their contents are not read.
    """
    global _recording
    previous, _recording = _recording, _Recording(target)
    try:
        yield _recording.launches
    finally:
        _recording = previous


def target_of(tensor: Tensor) -> Target:
    """The device of a tensor, or the one that launches are recorded for."""
    if _recording is not None:
        assert _recording.target is not None
        return _recording.target
    if tensor.device.type == "cpu":
        return Target("interpreter", processors=2)
    return _gpu(tensor.device.index)


@lru_cache
def _gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.partition(":")[0]
        return Target(arch, properties.multi_processor_count)
    arch = f"sm_{properties.major}{properties.minor}"
    return Target(arch, properties.multi_processor_count, descriptors=properties.major >= 9)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 1,
    blocks: int = 1,
    **constants: Any,
) -> None:
    """Start ``kernel`` on the current stream of the first tensor's device; no program, no launch.

    Args:
        kernel: a ``triton.jit`` function whose ``tl.constexpr`` parameters come last.
        grid: programs in each dimension.
        args: its other arguments, in order; the first is a tensor or a descriptor of one.
        num_warps, num_stages: compile options.
        blocks: programs meant to run on a processor at once; a compile check holds kernels to it.
        constants: its ``tl.constexpr`` arguments.
    """
    if 0 in grid:
        return
    if _recording is not None:
        names = [name for name in kernel.arg_names if name not in constants]
        arguments = dict(zip(names, args, strict=True))
        launch = Launch(kernel, grid, arguments, constants, num_warps, num_stages, blocks)
        _recording.launches.append(launch)
        return
    first = args[0]
    device = (first.base if isinstance(first, TensorDescriptor) else first).device
    options = {"num_warps": num_warps, "num_stages": num_stages, **OPTIONS}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, **options)
        return
    kernel[grid](*args, **constants, **options)


# Views of a plan's packed buffer: whether they start at a multiple of 16 bytes depends on the
# number of tokens, which must not compile a kernel of its own.
PARTS = [f"{name}_ptr" for name in PlanIndices._fields]
# Gradients of losses may be views of any address too, such as those of stacked losses of layers.
PARTS += ["dload_balance_ptr", "dz_loss_ptr", "dterms_ptr", "dloss_ptr"]


def block_size(size: int, smallest: int = 16, largest: int = 1 << 20) -> int:
    """The power of two that covers ``size``, within limits."""
    return min(max(triton.next_power_of_2(max(size, 1)), smallest), largest)
