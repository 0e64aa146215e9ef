"""Correctness before speed: outputs and gradients against the stage's truth in fp64."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import isfinite

import torch
from torch import Tensor

from benchmarks.entry import Inputs, Provider, Run, Stage
from benchmarks.gradients import step
from moe_kernels.testing import ERROR_FLOOR, relative_error

# Largest relative error of any provider. Far above rounding (1e-6 in fp32 at these sizes) and far
# below what a wrong row, weight or factor makes (1e-2 and more).
CEILING = {torch.float32: 3e-5, torch.bfloat16: 6e-2}

# Kinds of provider that are this library, held to the accuracy of the plain ones.
OURS = ("ours", "backend")


@dataclass
class Verdict:
    """What the check says of one provider.

    Attributes:
        status: ``"ok"``, ``"wrong"``, ``"skipped"`` (cannot run here), ``"limit"`` (not compared).
        errors: relative error of each output and gradient; integers: share of wrong elements.
        reason: why it is wrong or skipped.
    """

    status: str
    errors: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def timed(self) -> bool:
        """Whether its speed may be shown."""
        return self.status in ("ok", "limit")


def evaluate(run: Run, inputs: Inputs, gradients: bool) -> dict[str, Tensor]:
    """Outputs by name and, as ``d<leaf>``, gradients, in the layout of the truth."""
    found: Iterator[Tensor] = iter(())
    if gradients:
        outputs, computed = step(run, inputs)
        found = iter(computed)
    else:
        with torch.no_grad():
            outputs = run.call()
    results = dict(zip(run.outputs, outputs, strict=False))
    if gradients:
        for name, leaves in run.leaves.items():
            parts = [next(found) for _ in leaves]
            results[f"d{name}"] = parts[0] if len(parts) == 1 else torch.stack(parts)
    return {name: value.detach() for name, value in run.canonical(results).items()}


def truth(
    stage: Stage, inputs: Inputs, precision: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """The same from the stage's plain formulation in fp64, or fp32 where memory wants it."""
    leaves = {name: value.to(precision).requires_grad_() for name, value in inputs.leaves.items()}
    upstream = {name: value.to(precision) for name, value in inputs.upstream.items()}
    outputs = stage.expected(replace(inputs, leaves=leaves, upstream=upstream))
    results = {name: value.detach() for name, value in outputs.items()}
    if leaves:
        differentiated = [outputs[name] for name in upstream]
        found = torch.autograd.grad(differentiated, [*leaves.values()], [*upstream.values()])
        results |= {f"d{name}": value for name, value in zip(leaves, found, strict=True)}
    return results


def errors_of(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each float, share of wrong elements of each integer tensor."""
    errors = {}
    for name, value in results.items():
        # Gradients of separate leaves (one for each expert) come stacked; same numbers, same order.
        wanted = exact[name]
        if value.numel() != wanted.numel():
            raise ValueError(f"{name} has shape {tuple(value.shape)}, not {tuple(wanted.shape)}")
        if value.is_floating_point():
            errors[name] = relative_error(value.reshape(wanted.shape), wanted)
        else:
            wrong = value.reshape(wanted.shape).long() != wanted.long()
            errors[name] = float(wrong.double().mean()) if wrong.numel() else 0.0
    return errors


def judge(
    stage: Stage,
    inputs: Inputs,
    runs: dict[str, Run | str],
    dtype: torch.dtype,
) -> dict[str, Verdict]:
    """Compare every provider with the truth.

    Ours may err twice as much as the least accurate correct one in plain PyTorch, with the floor
    of the project's tests; every provider stays below ``CEILING``.

    Args:
        stage: of the entry.
        inputs: shared inputs.
        runs: the provider's run, or why it could not be built.
        dtype: of the entry.
    """
    exact = truth(stage, inputs)
    verdicts: dict[str, Verdict] = {}
    for name, run in runs.items():
        verdicts[name] = compare(stage.providers[name], run, inputs, exact, CEILING[dtype])
    hold_ours_to_plain(stage, verdicts, dtype)
    return verdicts


def hold_ours_to_plain(stage: Stage, verdicts: dict[str, Verdict], dtype: torch.dtype) -> None:
    """Ours may err twice as much as the least accurate correct provider in plain PyTorch."""
    plain = [
        verdict.errors
        for name, verdict in verdicts.items()
        if stage.providers[name].kind == "plain"
        and not stage.providers[name].library
        and verdict.status == "ok"
    ]
    for name, verdict in verdicts.items():
        if stage.providers[name].kind in OURS and verdict.status == "ok" and plain:
            _hold_to(verdict, plain, ERROR_FLOOR[dtype])


def compare(
    provider: Provider, run: Run | str, inputs: Inputs, exact: dict[str, Tensor], ceiling: float
) -> Verdict:
    """What one provider computes against the truth, every error below ``ceiling``."""
    # Ours has to run; an alternative that cannot (no compiler, a restriction) is left out.
    cannot = "wrong" if provider.kind == "ours" else "skipped"
    if isinstance(run, str):
        return Verdict(cannot, reason=run)
    gradients = not provider.forward_only and bool(run.leaves)
    try:
        results = evaluate(run, inputs, gradients)
        with torch.no_grad():
            run.call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # an error of a kernel shows here and not at the next provider
    except Exception as error:
        return Verdict(cannot, reason=first_line(error))
    if provider.kind == "limit":
        return Verdict("limit")
    try:
        errors = errors_of(results, exact)
    except (ValueError, KeyError) as error:
        return Verdict("wrong", reason=first_line(error))
    return _limited(Verdict("ok", errors), dict.fromkeys(errors, ceiling), results)


def _limited(verdict: Verdict, limits: dict[str, float], results: dict[str, Tensor]) -> Verdict:
    for name, error in verdict.errors.items():
        allowed = limits[name] if results[name].is_floating_point() else 0.0
        if not error <= allowed:
            verdict.status = "wrong"
            verdict.reason = f"{name}: error {error:.2g}, allowed {allowed:.2g}"
    # JSON has no NaN; the reason names it.
    verdict.errors = {name: error for name, error in verdict.errors.items() if isfinite(error)}
    return verdict


def _hold_to(verdict: Verdict, plain: list[dict[str, float]], floor: float) -> None:
    for name, error in verdict.errors.items():
        allowed = max([floor, *(2 * errors.get(name, 0.0) for errors in plain)])
        if not error <= allowed:
            verdict.status = "wrong"
            verdict.reason = f"{name}: error {error:.2g}, allowed {allowed:.2g}"


def first_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
