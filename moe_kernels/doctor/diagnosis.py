"""Everything that the doctor found, as data and as text, and what to do about it."""

import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moe_kernels import backends
from moe_kernels.backends.capabilities import explain
from moe_kernels.build_info import build_record
from moe_kernels.doctor import facts, programs
from moe_kernels.doctor.self_test import Check, devices, self_test, summary

ALL_WELL = "All that should work here works."


@dataclass(frozen=True)
class Problem:
    """Something that should work here and does not.

    Attributes:
        what: is wrong.
        remedy: what to do about it.
    """

    what: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found; print it, or ask ``ok``.

    Attributes:
        facts: versions, compilers, processor and GPUs, a line of text each.
        extras: of this package: "complete", or what is missing; empty in a source tree that was
            never installed.
        peers: versions of optional peers.
        environment: settings that are set.
        backends: lines of the backends table.
        checks: the self-test, one entry for each backend and device.
        seconds: how long the self-test took.
        notes: what is worth knowing and is no fault.
        problems: what should work and does not.
    """

    facts: dict[str, str]
    extras: dict[str, str]
    peers: dict[str, str]
    environment: dict[str, str]
    backends: tuple[str, ...]
    checks: tuple[Check, ...]
    seconds: float
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether all that should work here does."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        tested = "routing and expert MLP, forward and backward, against the reference"
        lines = [
            *_aligned(self.facts),
            *_section("extras", self.extras),
            *_section("optional peers", self.peers),
            *_section("settings", self.environment),
            *("", "backends"),
            *(f"  {line}".rstrip() for line in self.backends),
            *("", f"self-test: {tested} ({self.seconds:.1f} s)"),
            *(f"  {check}" for check in self.checks),
            "",
            *(f"note: {note}" for note in self.notes),
            *(f"problem: {problem.what}" for problem in self.problems),
        ]
        if self.ok:
            return "\n".join([*lines, ALL_WELL])
        remedies = "; ".join(dict.fromkeys(problem.remedy for problem in self.problems))
        return "\n".join([*lines, f"What to do: {remedies}."])


def diagnose() -> Diagnosis:
    """Look at this machine and try every backend that works on it, in about two seconds.

    Nothing but the kernels' own caches is written. Triton's kernels are compiled for a GPU when
    they first run on it, which takes longer, once.

    Returns:
        A ``Diagnosis``; ``python -m moe_kernels.doctor`` prints it.
    """
    driver, gpus = programs.nvidia_driver()
    problems: list[Problem] = []
    try:
        table = explain().splitlines()
        problems += _unmet_request()
    except Exception as error:  # a backend's module may raise anything when imported
        table = [f"no table: {summary(error)}"]
        problems.append(Problem(f"the backends: {summary(error)}", _remedy(summary(error))))
    start = time.perf_counter()
    checks = self_test()
    seconds = time.perf_counter() - start
    problems += [problem for problem in map(_problem, checks) if problem is not None]
    return Diagnosis(
        facts=facts.machine(driver),
        extras=facts.extras(),
        peers=facts.peers(),
        environment=facts.environment(),
        backends=tuple(table),
        checks=tuple(checks),
        seconds=seconds,
        notes=tuple(_notes(gpus)),
        problems=tuple(dict.fromkeys(problems)),
    )


def _problem(check: Check) -> Problem | None:
    """What is wrong about the outcome of a check; ``None`` when it is as it should be."""
    if check.status == "failed":
        where = f"{check.backend} on {check.device}" if check.device else check.backend
        return Problem(f"{where}: {check.detail}", _remedy(check.detail, check.backend))
    backend = backends.BACKENDS[check.backend]
    if check.status == "ok" or backend.module is None or not backend.why_no_kernel("dispatch"):
        return None
    what = f"{check.backend} {check.detail}"
    if build_record().get(backend.record, {}).get("built"):
        return Problem(what, "run pip install again, with this Python and on this machine")
    # A dependency on Linux; elsewhere its absence is nobody's fault.
    if check.backend == "triton" and torch.cuda.is_available() and sys.platform == "linux":
        return Problem(what, "run pip install triton")
    return None


def _remedy(detail: str, backend: str = "") -> str:
    if "MOE_KERNELS_" in detail:
        return "correct or unset the setting that the message names"
    if backend == "reference":
        return "install PyTorch again: plain PyTorch fails here, and everything stands on it"
    return (
        "run pip install again; until that helps, set MOE_KERNELS_BACKEND=reference and report "
        "this output"
    )


def _unmet_request() -> list[Problem]:
    """The problem that what is asked for everywhere can serve on no device here."""
    reason = ""
    for device in devices():
        try:
            for op in backends.OPS:
                backends.serving(op, device)
        except backends.BackendUnavailable as error:
            reason = str(error)
        else:
            return []
    remedy = "unset MOE_KERNELS_BACKEND, or add another to it: MOE_KERNELS_BACKEND=cuda,reference"
    return [Problem(reason, remedy)]


def _notes(gpus: list[str]) -> list[str]:
    """What explains a surprise later.

    Args:
        gpus: that the driver sees.
    """
    notes = []
    if gpus and not torch.cuda.is_available():
        why = f"is built for CUDA {torch.version.cuda}; is the driver older, or the GPU hidden?"
        if torch.version.cuda is None:
            why = "is built without CUDA; install one with it to use the GPU"
        notes.append(f"the driver sees {', '.join(gpus)}, PyTorch sees no GPU: it {why}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        notes.append("TRITON_INTERPRET=1: Triton's kernels are interpreted, for tests, slowly")
    for name, entry in build_record().items():
        if entry.get("sanitize"):
            notes.append(f"the {name} kernels check themselves ({entry['sanitize']}), slowly")
    for name, path in facts.foreign_modules().items():
        notes.append(f"{name} is loaded from {path}, of another installation; remove one of them")
    unknown = [name for name in facts.environment() if name.startswith("MOE_KERNELS_")]
    unknown = [name for name in unknown if name not in facts.VARIABLES]
    notes += [f"nothing reads {name}; the README lists the settings" for name in unknown]
    return notes


def _aligned(values: dict[str, str], indent: str = "") -> list[str]:
    width = max(map(len, values), default=0) + 2
    return [f"{indent}{name.ljust(width)}{value}" for name, value in values.items()]


def _section(title: str, values: dict[str, str]) -> list[str]:
    return ["", title, *(_aligned(values, "  ") or ["  none"])]
