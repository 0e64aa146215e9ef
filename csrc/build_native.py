"""Compile ``csrc/`` into the modules of ``moe_kernels``; setup.py calls ``build_modules``.

Nothing needs torch, and no module needs another: one that cannot be built leaves the others as
they are. ``build_cpu.py``, ``build_cuda.py`` and ``build_simulated.py`` say how each is compiled.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import build_cpu
import build_cuda
import build_simulated
from build_tools import BuildError, build_choice, max_jobs, sanitizers, wants_simulated

# By the name in the record: the module, and what builds it.
MODULES = {
    "cpu": ("_cpu", build_cpu.build),
    "cuda": ("_cuda", build_cuda.build),
    "simulated": ("_cuda_simulated", build_simulated.build),
}


@dataclass(frozen=True)
class Outcome:
    """What came of a module.

    Attributes:
        record: its entry in ``_build.json``.
        file: the module; ``None`` where there is none.
        failure: why there is none although it was asked for.
    """

    record: dict[str, Any]
    file: Path | None = None
    failure: BuildError | None = None


def build_modules(root: Path, packages: Sequence[Path], environ: Mapping[str, str]) -> None:
    """Build what the environment asks for, and put it into each of the package folders.

    Each folder also gets ``_build.json``, which says what happened. Of a module that was not
    built, no older one stays behind.

    Raises:
        BuildError: for a wrong setting; and under ``MOE_KERNELS_BUILD=cpu`` or ``cuda``, when
            everything else is in place, for a module that failed.
    """
    choice = build_choice(environ)
    sanitizers(environ)
    max_jobs(environ)
    outcomes = {name: _outcome(name, choice, root, environ) for name in MODULES}
    record = {name: outcome.record for name, outcome in outcomes.items()}
    for package in packages:
        package.mkdir(parents=True, exist_ok=True)
        for name, outcome in outcomes.items():
            _place(MODULES[name][0], outcome.file, package)
        (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")
    for outcome in outcomes.values():
        if outcome.failure is not None and choice in ("cpu", "cuda"):
            raise outcome.failure


def _outcome(name: str, choice: str, root: Path, environ: Mapping[str, str]) -> Outcome:
    module, build = MODULES[name]
    record: dict[str, Any] = {"built": False, "reason": "", "compiler": "", "sanitize": ""}
    reason = _not_asked_for(name, choice, environ)
    if reason:
        return Outcome(record | {"reason": reason})
    try:
        file = build(root, environ, record)
    except BuildError as error:
        print(f"moe_kernels.{module}: not built, because {error}", flush=True)
        return Outcome(record | {"reason": str(error)}, failure=error)
    made_for = ", ".join([*record.get("isas", ()), *record.get("archs", ())])
    by = f"{record['compiler']} for {made_for}" if made_for else record["compiler"]
    print(f"moe_kernels.{module}: built by {by}", flush=True)
    return Outcome(record | {"built": True}, file)


def _not_asked_for(name: str, choice: str, environ: Mapping[str, str]) -> str:
    """Say what keeps the environment from asking for this module; empty when it asks."""
    if name == "simulated" and not wants_simulated(environ):
        return "it is for tests; set MOE_KERNELS_SIMULATED to 1 and run pip install again"
    if choice == "none" or (choice == "cpu" and name == "cuda"):
        return (
            f"MOE_KERNELS_BUILD was {choice!r} when it was installed; "
            "set it to 'auto' and run pip install again"
        )
    return ""


def _place(module: str, file: Path | None, package: Path) -> None:
    if file is None:
        for old in package.glob(f"{module}.*"):
            if old.suffix in (".so", ".pyd"):
                old.unlink()
        return
    # A process may have the old module open: put the new one beside it, then swap.
    fresh = package / f"{file.name}.new"
    shutil.copy2(file, fresh)
    os.replace(fresh, package / file.name)
