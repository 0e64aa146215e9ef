"""What a library is to the benchmarks, and the signatures that its adapters share."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.gpu.time_limit import time_limit

# For importing one library; a run does not wait for one that hangs.
IMPORT_SECONDS = 120.0

# (T, D) tokens, (T, K) weights in fp32, (T, K) experts in int32, (E, 2F, D) first matrices with the
# gate half first, (E, D, F) second ones -> (T, D). Differentiable in all but the experts.
ExpertMLP = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

# (T, E) logits, K -> (T, K) weights in fp32, (T, K) experts in int64, (E,) tokens of each expert,
# load-balance loss. Weights and loss are differentiable.
Router = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]]

# (T, D) tokens, (T, E) routing map, R -> (R, D) rows, and what brings them back.
Permute = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]

# (R, D) rows, what ``Permute`` gave for the way back, (T, E) weights, (T, D) -> (T, D) tokens.
Unpermute = Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor]


Made = TypeVar("Made")


class Unavailable(RuntimeError):
    """Why a library takes no part on this machine."""


@dataclass(frozen=True)
class Experts:
    """One provider of an expert MLP.

    Attributes:
        make: imports what it needs and returns the adapter.
        summary: one line for the tables' legend.
    """

    make: Callable[[], ExpertMLP]
    summary: str


@dataclass(frozen=True)
class Library:
    """A library that the benchmarks measure beside this one.

    Attributes:
        name: in tables.
        module: name that is imported.
        distribution: name that pip knows.
        load: imports all that the adapters use, and raises what that raises.
        install: commands that install it beside the torch that is there.
        stages: which stages it takes part in.
        experts: its expert MLPs by the name of the provider.
        devices: types of device that it computes on.
        capability: smallest compute capability of a CUDA device.
        extra: the extra of this project that has it.
    """

    name: str
    module: str
    distribution: str
    load: Callable[[], object]
    install: tuple[str, ...]
    stages: tuple[str, ...] = ("dit_moe_layer",)
    experts: Mapping[str, Experts] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cuda",)
    capability: tuple[int, int] = (0, 0)
    extra: str | None = None

    def why_not_on(self, device: torch.device) -> str | None:
        """Why it does not compute on a device, from the device alone."""
        if device.type not in self.devices:
            return f"needs a CUDA device, this is the {device.type.upper()}"
        if device.type == "cuda":
            found = torch.cuda.get_device_capability(device)
            if found < self.capability:
                wanted = ".".join(map(str, self.capability))
                return f"needs compute capability {wanted}, this is {found[0]}.{found[1]}"
        return None

    def require_on(self, device: torch.device) -> None:
        """Raise the reason when it does not compute on a device."""
        reason = self.why_not_on(device)
        if reason is not None:
            raise Unavailable(reason)

    def on(self, device: torch.device, make: Callable[[], Made]) -> Made:
        """What ``make`` returns, where the library computes on the device.

        Raises:
            Unavailable: with the reason; an import may also raise anything of its own.
        """
        self.require_on(device)
        try:
            return make()
        except SystemExit as error:  # the end of that library, not of this program
            raise Unavailable(_first_line(error)) from error

    def version(self) -> str | None:
        """The installed version, ``None`` when it is not installed."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def why_not_importable(self) -> str | None:
        """Why its import fails, whatever it fails with."""
        return self._why_not(self.load)

    def left_out(self) -> dict[str, str]:
        """Why, for each of its expert MLPs that cannot be made here."""
        reasons = {name: self._why_not(experts.make) for name, experts in self.experts.items()}
        return {name: reason for name, reason in reasons.items() if reason}

    def _why_not(self, load: Callable[[], object]) -> str | None:
        try:
            with time_limit(IMPORT_SECONDS):
                load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # some end the process where they find no GPU
            return self._not_installed() or _first_line(error)
        return None

    def _not_installed(self) -> str | None:
        try:
            if importlib.util.find_spec(self.module) is not None:
                return None
        except (ImportError, ValueError):
            return None
        if self.extra is None:
            return "not installed"
        return f'not installed; it is in the extra: pip install "dit-moe-kernels[{self.extra}]"'


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
