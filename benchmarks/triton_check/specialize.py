"""From a recorded launch to what Triton's compiler takes, by the functions of Triton's own launch.

These are not public functions of Triton. They are used all the same, and here alone: a second
implementation of its rules (divisibility by 16, the value 1, ``None``, descriptors, pointers to
less than 2 GB on AMD) would prove something about kernels that nobody launches.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.triton_check.cases import Case
from benchmarks.triton_check.targets import Gpu
from moe_kernels.backends.triton.launch import OPTIONS, Launch


@dataclass(frozen=True)
class Compilation:
    """One binary to be made.

    Attributes:
        kernel: name of the function.
        arch: key of ``targets.GPUS``.
        case: the first that launches it.
        types: of the runtime arguments by name.
        constants: ``tl.constexpr`` arguments by name, as text.
        num_warps, num_stages: as asked for.
        intended_blocks: on a processor at once.
        source, options, target: for the compiler.
    """

    kernel: str
    arch: str
    case: Case
    types: dict[str, str]
    constants: dict[str, str]
    num_warps: int
    num_stages: int
    intended_blocks: int
    source: Any
    options: dict[str, Any]
    target: Any

    @property
    def key(self) -> str:
        """The same for equal binaries; stable when lines of the source move."""
        parts = [self.kernel, self.arch, self.num_warps, self.num_stages]
        parts += [sorted(self.types.items()), sorted(self.constants.items())]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def specialize(launch: Launch, gpu: Gpu, case: Case) -> Compilation:
    """What Triton would compile for this launch on ``gpu``."""
    target = GPUTarget("cuda" if gpu.is_nvidia else "hip", gpu.compiler_arch, gpu.warp_size)
    backend, kernel = make_backend(target), launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(
        **launch.args,
        **launch.constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        debug=False,
        **OPTIONS,
    )
    options, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    types = {
        name: _type_name(kind, attributes.get((position,), []))
        for position, (name, kind) in enumerate(signature.items())
        if name not in launch.constants
    }
    return Compilation(
        kernel=kernel.__name__,
        arch=gpu.arch,
        case=case,
        types=types,
        constants={name: str(value) for name, value in launch.constants.items()},
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        intended_blocks=launch.blocks,
        source=ASTSource(kernel, signature, constants, attributes),
        options=dict(options.__dict__),
        target=target,
    )


def _type_name(kind: str, attributes: list[list[Any]]) -> str:
    """The type, with what is known of the value: ``*bf16 /16``; ``None`` and 1 are constants."""
    if kind == "constexpr":
        return "constant"
    divisible = any(name == "tt.divisibility" for name, _ in attributes)
    small = any(name == "tt.pointer_range" for name, _ in attributes)
    return kind + (" /16" if divisible else "") + (" <2GB" if small else "")
