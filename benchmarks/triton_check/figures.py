"""What a binary needs of the processor, read from the binary itself."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs

from benchmarks.triton_check.specialize import Compilation
from benchmarks.triton_check.targets import GPUS, RESERVED_SHARED, Gpu, blocks_per_processor


@dataclass(frozen=True)
class Figures:
    """Resources of one compiled kernel.

    Attributes:
        registers: of a thread; vector registers on AMD (both kinds together).
        scalar_registers: AMD.
        stack: bytes of a thread's stack frame; AMD: private segment.
        spills: instructions that read or write the stack; AMD: registers spilled.
        shared: bytes of a block, fixed ones and those asked for at the launch.
        tensor_columns: of tensor memory (SM100).
        warps: of a block, those included that the compiler adds.
        blocks: that run on a processor at once.
        product: whether it multiplies 16-bit matrices.
        tensor_instructions: which of the architecture's instructions for that it has.
    """

    registers: int
    scalar_registers: int
    stack: int
    spills: int
    shared: int
    tensor_columns: int
    warps: int
    blocks: int
    product: bool
    tensor_instructions: tuple[str, ...]


def figures_of(binary: Any, compilation: Compilation) -> Figures:
    """Read them from a ``CompiledKernel``."""
    gpu = GPUS[compilation.arch]
    metadata = binary.metadata
    if gpu.is_nvidia:
        registers, stack, fixed, spills = _nvidia(binary.asm["cubin"])
        shared, scalar = metadata.shared + fixed, 0
    else:
        registers, scalar, stack, spills, shared = _amd(binary.asm["amdgcn"])
        shared = max(shared, metadata.shared)
    columns = getattr(metadata, "tmem_size", 0) or 0
    assembly = binary.asm["ptx" if gpu.is_nvidia else "amdgcn"]
    return Figures(
        registers=registers,
        scalar_registers=scalar,
        stack=stack,
        spills=spills,
        shared=shared,
        tensor_columns=columns,
        warps=metadata.num_warps,
        blocks=blocks_per_processor(gpu, registers, shared, metadata.num_warps, columns),
        product=has_16_bit_product(binary.asm["ttir"]),
        tensor_instructions=_found(gpu, assembly),
    )


def has_16_bit_product(ttir: str) -> bool:
    """Whether there is a ``tt.dot`` of bf16 or fp16 matrices."""
    return re.search(r"= tt\.dot .* : tensor<[\dx]+(bf16|f16)>", ttir) is not None


def _found(gpu: Gpu, assembly: str) -> tuple[str, ...]:
    return tuple(name for name in gpu.tensor_instructions if name in assembly)


def _nvidia(cubin: bytes) -> tuple[int, int, int, int]:
    """Registers, bytes of stack, bytes of fixed shared memory, instructions on the stack."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("-res-usage", path)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        assert found, usage
        registers, stack, shared, local = map(int, found.groups())
        stack += local
        spills = len(re.findall(r"\b(?:STL|LDL)\b", _cuobjdump("-sass", path))) if stack else 0
    # What Triton asks for at the launch is no part of SHARED; from SM90 on the system's share is.
    return registers, stack, max(0, shared - RESERVED_SHARED), spills


def _cuobjdump(option: str, path: Path) -> str:
    command = [knobs.nvidia.cuobjdump.path, option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(assembly: str) -> tuple[int, int, int, int, int]:
    """Vector registers, scalar ones, bytes of private segment, spills, bytes of local memory."""

    def value(name: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        assert found, name
        return int(found.group(1))

    spills = value("vgpr_spill_count") + value("sgpr_spill_count")
    return (
        value("vgpr_count"),  # agprs are part of it
        value("sgpr_count"),
        value("private_segment_fixed_size"),
        spills,
        value("group_segment_fixed_size"),
    )
