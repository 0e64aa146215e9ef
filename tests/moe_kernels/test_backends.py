"""The resolver: explicit requests are met or refused with the reason, and the table is complete."""

import os
import subprocess
import sys

import pytest
import torch

import moe_kernels as mk
from moe_kernels import backends
from moe_kernels.testing import make_logits

LOGITS = make_logits(8, 4)


@pytest.fixture(autouse=True)
def backend() -> None:
    """The resolver itself is tested here, so nobody chooses for it."""


def test_every_op_resolves_automatically():
    for op in backends.OPS:
        assert callable(backends.resolve(op, torch.device("cpu")))


def test_an_unmet_request_raises_with_the_reason():
    with pytest.raises(
        mk.BackendUnavailable, match="'cuda' was requested for expert_choice on cpu"
    ):
        mk.expert_choice(LOGITS, backend="cuda")
    with mk.use_backend("megablocks"), pytest.raises(mk.BackendUnavailable, match="megablocks"):
        mk.token_choice(LOGITS)
    mk.token_choice(LOGITS)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="backend is 'cud'"):
        mk.use_backend("cud")
    with pytest.raises(ValueError, match="backend is 'cud'"):
        mk.expert_choice(LOGITS, backend="cud")


def test_use_backend_nests_and_restores():
    with mk.use_backend("reference"):
        with mk.use_backend("auto"):
            mk.token_choice(LOGITS)
        assert backends._Default.name == "reference"
    assert backends._Default.name is None


def test_a_backend_can_be_plugged_in(monkeypatch):
    calls = []

    def fake(plan):
        calls.append(plan)
        return torch.tensor(7.0)

    fast = backends.Backend("fast", "a plug", ("cpu",), module="a.module")
    monkeypatch.setattr(backends, "_resolved", {})
    monkeypatch.setitem(backends._loaded, "fast", {"router_z_loss": fake})
    reference = backends.BACKENDS["reference"]
    monkeypatch.setattr(backends, "BACKENDS", {"fast": fast, "reference": reference})
    plan = mk.token_choice(LOGITS)
    assert float(mk.router_z_loss(plan)) == 7.0
    assert float(mk.router_z_loss(plan, backend="reference")) != 7.0
    assert len(calls) == 1
    assert "has no kernel for" in str(fast.why_not("combine", "cpu"))
    assert "runs on cpu only" in str(fast.why_not("router_z_loss", "cuda"))


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **env}
    )


def test_table_has_a_reason_for_every_empty_cell():
    result = run("-m", "moe_kernels.backends")
    assert result.returncode == 0, result.stderr
    for op in backends.OPS:
        assert f"\n{op} " in result.stdout
    lines = result.stdout.splitlines()
    reasons = dict.fromkeys(("cuda", "megablocks"), "not in this version")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        reasons["triton"] = "runs on cuda only, not on cpu"
    for name, reason in reasons.items():
        (place,) = [i for i, line in enumerate(lines) if line.startswith(f"{name}: ")]
        assert lines[place + 1] == f"  - every op: {reason}"


def test_environment_variable():
    code = "import moe_kernels.backends as b; print(b._Default.name)"
    assert run("-c", code, MOE_KERNELS_BACKEND="reference").stdout.strip() == "reference"
    wrong = run("-c", code, MOE_KERNELS_BACKEND="cudnn")
    assert wrong.returncode != 0
    assert "MOE_KERNELS_BACKEND is 'cudnn'" in wrong.stderr
