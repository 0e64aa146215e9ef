"""A small layer, forward and backward, on every backend that works here, against the reference."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels import backends
from moe_kernels.backends import Backend, measured
from moe_kernels.testing import ERROR_FLOOR, make_logits, relative_error

EXPERTS = 4
ROUTERS = ("token_choice", "expert_choice")
# T, D, F: several tiles of a kernel, and a rest of one.
SIZES = (128, 40, 56)
# Triton's interpreter and the simulated GPU take milliseconds for what a GPU does in nanoseconds.
SMALL = (16, 24, 40)
Results = dict[str, Tensor]
Sizes = tuple[int, int, int]
_CPU = torch.device("cpu")
# The op that tells whether a backend works on a device, where it is not "dispatch".
_PROBES = {"megablocks": "expert_mlp"}
OUT = "token_choice's out"


@dataclass(frozen=True)
class Check:
    """What came of one backend on one device.

    Attributes:
        backend: its name.
        device: "cpu", "cuda:0"; empty where the backend works on no device here.
        status: "ok", "failed" or "not here".
        detail: the errors found, why it failed, or why it is not here.
        seconds: how long it took, compiling included.
    """

    backend: str
    device: str
    status: str
    detail: str
    seconds: float = 0.0

    def __str__(self) -> str:
        what = f"{self.backend} on {self.device}" if self.device else self.backend
        took = f"{self.seconds:.2f} s" if self.device else ""
        return f"{what.ljust(20)} {self.status.ljust(9)} {took.rjust(7)}  {self.detail}"


def self_test() -> list[Check]:
    """Check every backend on the CPU and on one GPU of each architecture."""
    expected = _Expected()
    return [check for each in backends.BACKENDS.values() for check in _checks(each, expected)]


def devices() -> list[torch.device]:
    """The CPU, and the first GPU of each architecture."""
    gpus: dict[str | None, torch.device] = {}
    for index in range(torch.cuda.device_count()):
        gpus.setdefault(measured.architecture("cuda", index), torch.device("cuda", index))
    return [torch.device("cpu"), *gpus.values()]


class _Expected:
    """The reference's results on the CPU, made when they are first needed."""

    def __init__(self) -> None:
        self._made: dict[tuple[Sizes, torch.dtype], tuple[Results, Results]] = {}

    def results(self, sizes: Sizes, dtype: torch.dtype) -> tuple[Results, Results]:
        """Plain PyTorch's in the dtype, and the exact ones: the same inputs in fp64."""
        if (sizes, dtype) not in self._made:
            self._made[sizes, dtype] = (
                _layer("reference", _CPU, sizes, dtype, dtype),
                _layer("reference", _CPU, sizes, dtype, torch.float64),
            )
        return self._made[sizes, dtype]


def _checks(backend: Backend, expected: _Expected) -> Iterator[Check]:
    op = _PROBES.get(backend.name, "dispatch")
    try:
        reasons = {device: backend.why_not(op, device.type) for device in devices()}
        # A module that cannot be loaded is said before a missing GPU.
        missing = backend.why_no_kernel(op) if backend.module else None
    except Exception as error:  # a backend's module may raise anything when imported
        yield Check(backend.name, "", "failed", summary(error))
        return
    here = [device for device, reason in reasons.items() if reason is None]
    for device in here:
        yield _check(backend.name, device, expected)
    if not here:
        yield Check(backend.name, "", "not here", missing or next(iter(reasons.values())) or "")


def _check(name: str, device: torch.device, expected: _Expected) -> Check:
    said, status, seconds = [], "ok", 0.0
    played = name in ("triton", "cuda") and device.type == "cpu"
    sizes = SMALL if played else SIZES
    try:
        for dtype in _dtypes(name, device):
            wanted = expected.results(sizes, dtype)
            start = time.perf_counter()
            share, wrong = _compare(name, device, sizes, wanted)
            seconds += time.perf_counter() - start
            said.append(wrong or f"{_short(dtype)}: {share:.0%} of the error allowed, equal bits")
            status = "failed" if wrong else status
    except Exception as error:  # compilers and drivers raise many types; each is a finding
        said, status = [summary(error)], "failed"
    return Check(name, str(device), status, "; ".join(said), seconds)


def _dtypes(name: str, device: torch.device) -> tuple[torch.dtype, ...]:
    if name == "megablocks":
        return (torch.bfloat16,)
    # Triton's interpreter multiplies bf16 wrongly; the kernels are not to blame.
    if name == "triton" and device.type == "cpu":
        return (torch.float32,)
    return torch.float32, torch.bfloat16


def _compare(
    name: str, device: torch.device, sizes: Sizes, wanted: tuple[Results, Results]
) -> tuple[float, str]:
    """The largest error as a share of what is allowed, and what is wrong; empty if nothing is.

    Allowed is twice the error of plain PyTorch in the same dtype, or the floor of the tests.
    """
    plain, exact = wanted
    dtype = plain[OUT].dtype
    # What a backend has no kernel for is the reference's, as in a request of two names.
    request = name if name == "reference" else f"{name},reference"
    routers = ROUTERS[:1] if name == "megablocks" else ROUTERS
    first, again = (_layer(request, device, sizes, dtype, dtype, routers) for _ in range(2))
    share = 0.0
    for key, result in first.items():
        if not bool(result.isfinite().all()):
            return share, f"{_short(dtype)}: {key} holds NaN or infinity"
        if not torch.equal(result, again[key]):
            return share, f"{_short(dtype)}: {key} differs between two equal runs"
        result = result.cpu()
        if not result.is_floating_point():
            if not torch.equal(result, plain[key]):
                return share, f"{_short(dtype)}: {key} is not the reference's"
            continue
        allowed = max(2 * relative_error(plain[key], exact[key]), _floor(result.dtype, device))
        error = relative_error(result, exact[key])
        if error > allowed:
            return share, f"{_short(dtype)}: {key} errs by {error:.2g}; allowed is {allowed:.2g}"
        share = max(share, error / allowed)
    return share, ""


def _floor(dtype: torch.dtype, device: torch.device) -> float:
    rounded = getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") == "tf32"
    if rounded and dtype == torch.float32 and device.type == "cuda":
        dtype = torch.float16  # TF32 has as many digits
    return ERROR_FLOOR[dtype]


def _layer(
    request: str,
    device: torch.device,
    sizes: Sizes,
    dtype: torch.dtype,
    compute: torch.dtype,
    routers: tuple[str, ...] = ROUTERS,
) -> Results:
    """Every router, rows there and back, the expert MLP, losses, and every gradient.

    Args:
        request: the backends that are asked for.
        device: that computes.
        sizes: T, D, F.
        dtype: the inputs are rounded to it.
        compute: what they are converted to then; fp64 gives the exact results.
        routers: which of ``ROUTERS``.
    """
    tokens, hidden, inner = sizes
    wide = torch.float64 if compute == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)  # the caller's random state stays

    def randn(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
        return (values * 0.3).to(dtype).to(device, compute)

    logits = make_logits(tokens, EXPERTS).to(device, wide)
    x, upstream = randn(tokens, hidden), randn(tokens, hidden)
    w_in, w_out = randn(EXPERTS, 2 * inner, hidden), randn(EXPERTS, hidden, inner)
    leaves = {"router_logits": logits, "x": x, "w_in": w_in, "w_out": w_out}
    found: Results = {}
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for leaf in leaves.values():
            leaf.requires_grad_()
        for router in routers:
            if router == "token_choice":
                plan = mk.token_choice(logits, 2, num_groups=2, backend=request)
            else:
                plan = mk.expert_choice(logits, num_groups=2, backend=request)
            out = mk.expert_mlp(x, plan, w_in, w_out, activation="swiglu", backend=request)
            moved = mk.combine(mk.dispatch(x, plan, backend=request), plan, backend=request)
            loss = mk.load_balance_loss(plan, backend=request)
            loss = loss + mk.router_z_loss(plan, backend=request)
            gradients = torch.autograd.grad(
                [out, moved, loss], list(leaves.values()), [upstream, upstream, None]
            )
            results = {"token_indices": plan.token_indices, "expert_offsets": plan.expert_offsets}
            results |= {"routing_weights": plan.routing_weights, "out": out, "combined": moved}
            results |= {"loss": loss}
            results |= {f"d{leaf}": g for leaf, g in zip(leaves, gradients, strict=True)}
            found |= {f"{router}'s {key}": tensor.detach() for key, tensor in results.items()}
    return found


def summary(error: BaseException) -> str:
    """Type and first words of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"[:300]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
