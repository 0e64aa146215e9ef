"""The GPUs that are compiled for, and what one processor of each of them holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Limits of one processor (SM or compute unit) of an architecture.

    Attributes:
        arch: as the launchers know it.
        compiler_arch: as Triton's compiler knows it.
        processors: of the product that the launchers are told of: A100, H100 SXM, B200, RTX 5090,
            MI300X.
        descriptors: whether tiles are loaded by tensor descriptors.
        warps: resident at once; of 64 threads on AMD.
        blocks: resident at once.
        shared: bytes for all its blocks.
        shared_block: bytes that one block may have.
        tensor_instructions: any of these must be in the assembly of a kernel with a 16-bit product.
    """

    arch: str
    compiler_arch: int | str
    processors: int
    descriptors: bool
    warps: int
    blocks: int
    shared: int
    shared_block: int
    tensor_instructions: tuple[str, ...]

    @property
    def is_nvidia(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def warp_size(self) -> int:
        return 32 if self.is_nvidia else 64


# NVIDIA: cuda_occupancy.h of CUDA 13.0 and the table "technical specifications per compute
# capability" of its programming guide. AMD: CDNA3 instruction set reference, section 3 (4 SIMDs of
# 512 vector registers and 8 waves, 64 KB of local memory).
GPUS = {
    gpu.arch: gpu
    for gpu in (
        Gpu("sm_80", 80, 108, False, 64, 32, 164 << 10, 163 << 10, ("mma.sync",)),
        Gpu("sm_90", 90, 132, True, 64, 32, 228 << 10, 227 << 10, ("wgmma",)),
        Gpu("sm_100", 100, 148, True, 64, 32, 228 << 10, 227 << 10, ("tcgen05",)),
        Gpu("sm_120", 120, 170, True, 48, 24, 100 << 10, 99 << 10, ("mma.sync",)),
        Gpu("gfx942", "gfx942", 304, False, 32, 32, 64 << 10, 64 << 10, ("v_mfma",)),
    )
}

_REGISTERS = 65536  # of 32 bits in an SM, handed out to a warp in units of 256, in 4 partitions
_PARTITIONS = 4
RESERVED_SHARED = 1024  # bytes that the system takes of every block, from SM80 on
_SHARED_UNIT = 128
_TENSOR_COLUMNS = 512  # of an SM100's tensor memory
_VECTOR_REGISTERS = 512  # of a SIMD for each of its lanes, handed out in units of 8
_WAVES = 8  # of a SIMD


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_per_processor(
    gpu: Gpu, registers: int, shared: int, warps: int, tensor_columns: int = 0
) -> int:
    """Blocks that run on one processor at once; 0 when not even one fits.

    Args:
        gpu: which.
        registers: of a thread.
        shared: bytes of a block.
        warps: of a block.
        tensor_columns: of tensor memory that a block takes (SM100).
    """
    limits = [gpu.warps // warps, gpu.blocks]
    if not gpu.is_nvidia:
        waves = min(_WAVES, _VECTOR_REGISTERS // _round_up(max(registers, 1), 8))
        limits.append(waves * _PARTITIONS // warps)
        if shared:
            limits.append(gpu.shared // shared)
        return min(limits)
    if shared > gpu.shared_block:
        return 0
    warp_registers = _round_up(max(registers, 1) * gpu.warp_size, 256)
    resident_warps = _REGISTERS // _PARTITIONS // warp_registers * _PARTITIONS
    limits.append(resident_warps // warps)
    limits.append(gpu.shared // _round_up(shared + RESERVED_SHARED, _SHARED_UNIT))
    if tensor_columns:
        limits.append(_TENSOR_COLUMNS // tensor_columns)
    return min(limits)
