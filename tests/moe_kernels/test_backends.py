"""The resolver: explicit requests are met or refused with the reason, and the table is complete.

Backends with a part of the ops, and GPUs of two kinds, are stand-ins: the choice needs no kernel.
"""

import importlib
import logging
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import moe_kernels as mk
from moe_kernels import backends
from moe_kernels.backends import capabilities, measured
from moe_kernels.testing import make_logits

LOGITS = make_logits(8, 4)


@pytest.fixture(autouse=True)
def backend() -> None:
    """The resolver itself is tested here, so nobody chooses for it."""


def test_every_op_resolves_automatically():
    for op in backends.OPS:
        assert callable(backends.resolve(op, torch.device("cpu")))


def test_an_unmet_request_raises_with_the_reason():
    plan = mk.token_choice(LOGITS)
    with pytest.raises(
        mk.BackendUnavailable, match="'cuda' was requested for router_similarity_loss on cpu but"
    ):
        mk.router_similarity_loss(plan, backend="cuda")
    with mk.use_backend("megablocks"), pytest.raises(mk.BackendUnavailable, match="megablocks"):
        mk.token_choice(LOGITS)
    mk.token_choice(LOGITS)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="backend is 'cud'"):
        mk.use_backend("cud")
    with pytest.raises(ValueError, match="backend is 'cud'"):
        mk.expert_choice(LOGITS, backend="cud")
    for wrong in ("reference,cud", "reference,auto", "reference,", ""):
        with pytest.raises(ValueError, match=f"backend is '{wrong}'; expected .* 'cuda,triton'"):
            mk.use_backend(wrong)
    assert backends._Default.name is None


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


@pytest.fixture
def stand_ins(monkeypatch):
    """Backends ``most`` and ``few`` (one op) for two kinds of GPU, and no measurement."""
    reference = backends.BACKENDS["reference"]
    few = backends.Backend("few", "one op", ("cuda",), module="a.few")
    most = backends.Backend("most", "all but one op", ("cuda",), module="a.most")
    gone = backends.Backend("gone", "cannot be imported", ("cuda",), module="no_such_module")
    known = {backend.name: backend for backend in (most, few, gone, reference)}
    monkeypatch.setattr(backends, "BACKENDS", known)
    monkeypatch.setattr(backends, "MEASURED", {})
    for name in ("_resolved", "_broken"):
        monkeypatch.setattr(backends, name, {})
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.setattr(importlib, "import_module", fake_import(importlib.import_module))
    functions = {
        name: {op: partial(lambda name, op, *_: (name, op), name, op) for op in ops}
        for name, ops in (("few", ("dispatch",)), ("most", set(backends.OPS) - {"combine"}))
    }
    for name, found in functions.items():
        monkeypatch.setitem(backends._loaded, name, found)
    architectures = {0: "sm_80", 1: "sm_90"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        measured,
        "architecture",
        lambda kind, index: architectures[index] if kind == "cuda" else None,
    )


def fake_import(real):
    """The modules of the stand-ins have nothing to say."""
    return lambda name: object() if name.startswith("a.") else real(name)


def entry(op: str, arch: str, backend: str) -> dict[tuple[str, str], measured.Measured]:
    cited = "benchmarks/results/a-gpu.json"
    return {(op, arch): measured.Measured(op, arch, backend, "most", 1.75, cited, ("x", "y"))}


GPUS = [torch.device("cuda", index) for index in (0, 1)]


@pytest.mark.usefixtures("stand_ins")
def test_a_measurement_decides_for_its_op_and_architecture_only(monkeypatch):
    assert [backends.serving("dispatch", gpu) for gpu in GPUS] == ["most", "most"]
    monkeypatch.setattr(backends, "MEASURED", entry("dispatch", "sm_90", "few"))
    assert [backends.serving("dispatch", gpu) for gpu in GPUS] == ["most", "few"]
    assert [backends.resolve("dispatch", gpu)()[0] for gpu in GPUS] == ["most", "few"]
    assert [backends.resolve("dispatch", gpu)()[0] for gpu in GPUS] == ["most", "few"]
    assert backends.serving("router_probs", GPUS[1]) == "most"
    assert backends.serving("combine", GPUS[1]) == "reference"
    assert backends.serving("dispatch", torch.device("cpu")) == "reference"
    # A request goes before a measurement.
    assert backends.serving("dispatch", GPUS[1], "most") == "most"


@pytest.mark.usefixtures("stand_ins")
def test_a_measured_backend_that_is_missing_is_passed_over_aloud(monkeypatch, caplog):
    monkeypatch.setattr(backends, "MEASURED", entry("dispatch", "sm_90", "gone"))
    with caplog.at_level(logging.INFO, "moe_kernels"):
        assert backends.serving("dispatch", GPUS[1]) == "most"
        assert backends.serving("dispatch", GPUS[1]) == "most"
    (message,) = caplog.messages
    assert message.startswith("dispatch on cuda: gone passed over, because it cannot be imported")


@pytest.mark.usefixtures("stand_ins")
def test_the_first_of_a_list_that_serves_the_op(caplog):
    with mk.use_backend("few, most"), caplog.at_level(logging.INFO, "moe_kernels"):
        assert backends._Default.name == "few,most"
        assert backends.serving("dispatch", GPUS[0]) == "few"
        assert backends.serving("router_probs", GPUS[0]) == "most"
        assert backends.resolve("dispatch", GPUS[0], "most,few")()[0] == "most"
        with pytest.raises(mk.BackendUnavailable) as caught:
            backends.resolve("combine", GPUS[0])
    assert str(caught.value).startswith(
        "backend 'few,most' was requested for combine on cuda but few has no kernel for it; "
        "most has no kernel for it. Use 'auto'"
    )
    assert "router_probs on cuda: few passed over, because it has no kernel for it" in caplog.text
    with pytest.raises(mk.BackendUnavailable, match=r"gone cannot be imported \(.*\); few has no"):
        backends.resolve("combine", GPUS[0], "gone,few")
    with pytest.raises(
        mk.BackendUnavailable, match="'few' was requested for combine on cuda but h"
    ):
        backends.resolve("combine", GPUS[0], "few")


@pytest.mark.usefixtures("stand_ins")
def test_the_table_names_each_kind_of_gpu_and_cites_what_decided(monkeypatch):
    found = {**entry("dispatch", "sm_90", "few"), **entry("combine", "sm_80", "gone")}
    monkeypatch.setattr(backends, "MEASURED", found)
    lines = capabilities.explain().splitlines()
    assert lines[0].endswith("devices: cpu, cuda:0 (sm_80), cuda:1 (sm_90)")
    (dispatch,) = [line for line in lines if line.startswith("dispatch ")]
    assert dispatch.endswith("cpu: reference, sm_80: most, sm_90: few")
    others = ", ".join(op for op in backends.OPS if op != "dispatch")
    assert lines[lines.index("few: one op") + 1] == f"  - {others}: has no kernel for it"
    # The entry for sm_80 names a backend that does not serve there, so it decided nothing.
    cited = "(benchmarks/results/a-gpu.json, 2 shapes)"
    assert lines[lines.index("automatic by measurement:") + 1 :] == [
        f"  - dispatch on sm_90: few, 1.75x as fast as most {cited}"
    ]


def test_a_missing_gpu_is_said_after_a_missing_module(monkeypatch):
    plug = backends.Backend("plug", "a plug", ("cuda",), module="no_such_module", record="plug")
    monkeypatch.setattr(backends, "_broken", {})
    monkeypatch.setattr(backends, "build_record", lambda: {"plug": {"built": True}})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    devices = capabilities._devices()
    assert list(devices) == ["cpu"]
    missing = capabilities._why_nowhere(plug, "combine", devices) or ""
    assert missing.startswith("was built but cannot be loaded (No module named 'no_such_module')")
    assert plug.why_not("combine", "cpu") == "runs on cuda only, not on cpu"
    monkeypatch.setattr(backends, "_broken", {})
    monkeypatch.setitem(backends._loaded, "plug", {"combine": abs})
    assert capabilities._why_nowhere(plug, "combine", devices) == capabilities.NO_GPU
    assert capabilities._why_nowhere(plug, "dispatch", devices) == "has no kernel for it"


@pytest.mark.parametrize("request_", [None, "few,reference"], ids=["measured", "list"])
def test_choices_are_constants_of_compiled_code(monkeypatch, request_):
    """The stand-in serves the CPU, and its measurement is said to be of this machine."""
    few = backends.Backend("few", "one op", ("cpu",), module="a_few")
    known = {"reference": backends.BACKENDS["reference"], "few": few}
    monkeypatch.setattr(backends, "BACKENDS", known)
    functions = {"router_z_loss": lambda plan: plan.num_tokens * 1.0}
    monkeypatch.setitem(sys.modules, "a_few", SimpleNamespace(IMPLEMENTATIONS=functions))
    monkeypatch.setattr(backends, "MEASURED", entry("router_z_loss", "sm_90", "few"))
    monkeypatch.setattr(measured, "architecture", lambda kind, index: None if request_ else "sm_90")
    monkeypatch.setattr(backends, "_resolved", {})

    def losses(logits):
        plan = mk.token_choice(logits, backend="reference")
        return plan.routing_weights.sum() + mk.router_z_loss(plan), mk.load_balance_loss(plan)

    torch._dynamo.reset()
    with mk.use_backend(request_):
        expected = losses(LOGITS)
        # Both backends are loaded while the function is traced.
        monkeypatch.setattr(backends, "_loaded", {name: {} for name in known})
        found = torch.compile(losses, fullgraph=True, backend="eager")(LOGITS)
    torch.testing.assert_close(found, expected)
    assert float(found[0]) > 8.0


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
    reasons = {}
    missing = backends.BACKENDS["megablocks"].why_no_kernel("expert_mlp")
    if missing is not None:
        reasons["megablocks"] = missing
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        reasons["triton"] = capabilities.NO_GPU
    cuda = backends.BACKENDS["cuda"]
    not_built = cuda.why_no_kernel("expert_choice")
    if not_built is not None:
        reasons["cuda"] = not_built
    elif not torch.cuda.is_available() and not cuda.on_request:
        assert f"  - {', '.join(cuda.implementations())}: {capabilities.NO_GPU}" in lines
    for name, reason in reasons.items():
        (place,) = [i for i, line in enumerate(lines) if line.startswith(f"{name}: ")]
        assert lines[place + 1] == f"  - every op: {reason}"


def test_environment_variable():
    code = "import moe_kernels.backends as b; print(b._Default.name)"
    assert run("-c", code, MOE_KERNELS_BACKEND="reference").stdout.strip() == "reference"
    listed = run("-c", code, MOE_KERNELS_BACKEND="triton, reference")
    assert listed.stdout.strip() == "triton,reference"
    wrong = run("-c", code, MOE_KERNELS_BACKEND="cudnn")
    assert wrong.returncode != 0
    assert "MOE_KERNELS_BACKEND is 'cudnn'" in wrong.stderr
