"""The table of measured choices: what is shipped, what is refused, how a GPU is named."""

import json
from types import SimpleNamespace

import pytest
import torch

from moe_kernels.backends import BACKENDS, MEASURED, OPS, measured

ENTRY = {
    "op": "expert_choice",
    "arch": "sm_90",
    "backend": "cuda",
    "over": "triton",
    "ratio": 1.8,
    "measurement": "benchmarks/results/a-gpu.json",
    "entries": ["gpu_expert_choice/B32-S256-E8"],
}


@pytest.fixture(autouse=True)
def backend() -> None:
    """No op is called here."""


@pytest.fixture
def table(tmp_path):
    def read(*entries):
        path = tmp_path / "measured.json"
        path.write_text(json.dumps(list(entries)))
        return measured.read(path, OPS, BACKENDS)

    return read


def test_the_shipped_table_is_read_when_the_package_is_imported():
    assert measured.read(measured.TABLE, OPS, BACKENDS) == MEASURED


def test_entries_are_found_by_op_and_architecture(table):
    found = table(ENTRY, {**ENTRY, "arch": "gfx942"}, {**ENTRY, "op": "combine", "ratio": 2})
    assert set(found) == {
        ("expert_choice", "sm_90"),
        ("expert_choice", "gfx942"),
        ("combine", "sm_90"),
    }
    entry = found["expert_choice", "sm_90"]
    assert entry.backend == "cuda"
    assert entry.entries == ("gpu_expert_choice/B32-S256-E8",)
    words = "expert_choice on sm_90: cuda, 1.80x as fast as triton"
    assert entry.words() == f"{words} (benchmarks/results/a-gpu.json, 1 shapes)"
    assert table() == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"op": "dispath"}, "has op 'dispath'; expected one of expert_choice"),
        ({"backend": "cudnn"}, "has backend 'cudnn'; expected one of triton"),
        ({"over": "cudnn"}, "has over 'cudnn'"),
        ({"over": "cuda"}, "compares backend 'cuda' with itself"),
        ({"arch": "9.0"}, "has arch '9.0'; expected something like 'sm_90'"),
        ({"ratio": "1.8"}, "has ratio '1.8'; expected a positive number"),
        ({"ratio": -1}, "has ratio -1"),
        ({"measurement": "/tmp/a.json"}, "cites '/tmp/a.json'; expected a file benchmarks/results"),
        ({"measurement": "benchmarks/results/a.md"}, "cites 'benchmarks/results/a.md'"),
        ({"entries": []}, r"has entries \[\]; expected a list of names"),
        ({"entries": "all"}, "has entries 'all'"),
        ({"note": "fast"}, "exactly these keys: arch, backend, entries, measurement"),
    ],
)
def test_impossible_entries_are_refused_and_shown(table, change, words):
    with pytest.raises(ValueError, match=words) as caught:
        table(ENTRY, {**ENTRY, "arch": "sm_80", **change})
    assert json.dumps({**ENTRY, "arch": "sm_80", **change}) in str(caught.value)


def test_two_entries_for_one_op_and_architecture_are_refused(table):
    with pytest.raises(ValueError, match="is the second one for this op and architecture"):
        table(ENTRY, {**ENTRY, "ratio": 2.0})


def test_a_table_that_is_no_list_is_refused(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(ENTRY))
    with pytest.raises(ValueError, match="holds a dict; expected a list of entries"):
        measured.read(path, OPS, BACKENDS)


def test_gpus_are_named_by_their_architecture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    capabilities = {None: (8, 0), 0: (8, 0), 1: (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert measured.architecture("cuda", None) == "sm_80"
    assert measured.architecture("cuda", 1) == "sm_120"
    assert measured.architecture("cpu", None) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert measured.architecture("cuda", 0) == "gfx942"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measured.architecture("cuda", 0) is None
