"""The compiled module, and what every call to it needs."""

import os
import re
from types import ModuleType

import torch
from torch import Tensor

from moe_kernels.build_info import build_record

# Tests run the kernels on a simulated GPU, on CPU tensors.
SIMULATED = os.environ.get("MOE_KERNELS_SIMULATED_GPU") == "1"
DEVICE_TYPES = ("cpu",) if SIMULATED else ("cuda",)

# Values of the enums in csrc/routing.hpp.
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
AFFINITIES = {"softmax": 0, "sigmoid": 1, "identity": 2}

PAGE = 4096  # counters that are allocated at a time


def _module() -> ModuleType:
    if SIMULATED:
        from moe_kernels import _cuda_simulated

        return _cuda_simulated
    from moe_kernels import _cuda

    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        archs = build_record().get("cuda", {}).get("archs", [])
        if not runs_on(archs, capability):
            raise ImportError(
                f"it was built for {', '.join(archs)}, and {torch.cuda.get_device_name()} has "
                f"{'.'.join(map(str, capability))}; set TORCH_CUDA_ARCH_LIST"
            )
    return _cuda


def runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether one of ``archs`` ("8.0", "9.0a", "12.0+PTX") runs on a GPU of this capability."""
    for arch in archs:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        assert found is not None, arch
        major, minor = int(found[1]), int(found[2])
        if (major, minor) == capability:
            return True
        if found[3] == "a":  # of this one GPU
            continue
        same_family = major == capability[0] and minor <= capability[1]
        if same_family or (found[4] and (major, minor) <= capability):
            return True
    return False


native = _module()
MOST_EXPERTS: int = native.MOST_EXPERTS  # that the routing kernels take


def describe() -> str:
    """What the backends table says of the module."""
    if SIMULATED:
        return "on a simulated GPU"
    archs = ", ".join(build_record().get("cuda", {}).get("archs", []))
    reason = native.why_no_gpu()
    return f"built for {archs}" + (f"; {reason}" if reason else "")


def address(tensor: Tensor | None) -> int:
    """Data pointer; 0 for ``None``."""
    return 0 if tensor is None else tensor.data_ptr()


def place(tensor: Tensor) -> tuple[int, int]:
    """GPU and current stream of a tensor, as the module wants them."""
    device = tensor.device
    assert device.type in DEVICE_TYPES, device
    if SIMULATED:
        return 0, 0
    return device.index, torch.cuda.current_stream(device).cuda_stream


class _Counters:
    """Addresses of counters of blocks that have ended: 0, and 0 again when a kernel is done.

    The launches of a stream run one after another and share one. A launch that is captured into a
    CUDA graph may be replayed beside others, and gets one for itself, for good. They are the
    module's own memory: that of PyTorch may belong to a graph. A stream is known by its handle;
    CUDA's per-thread default stream, one handle for many streams, is not supported.
    """

    def __init__(self) -> None:
        self._of_stream: dict[tuple[int, int], int] = {}
        self._unused: dict[int, list[int]] = {}
        self.pages: dict[int, list[int]] = {}  # first addresses, of PAGE counters each

    def take(self, place: tuple[int, int]) -> int:
        """Return the counter of a launch on this GPU and stream."""
        if native.is_capturing(place[1]):
            return self._next(place[0])
        if place not in self._of_stream:
            self._of_stream[place] = self._next(place[0])
        return self._of_stream[place]

    def _next(self, device: int) -> int:
        unused = self._unused.setdefault(device, [])
        if not unused:
            first = native.new_counters(device, PAGE)
            self.pages.setdefault(device, []).append(first)
            unused.extend(range(first, first + 4 * PAGE, 4))
        return unused.pop()


counters = _Counters()
