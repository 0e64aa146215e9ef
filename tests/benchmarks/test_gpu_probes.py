"""What is asked of ``torch.cuda``, with stand-ins for it: the calls, their order and arguments."""

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.entry import CPU
from benchmarks.gpu import clock, hardware, probes, runner
from benchmarks.gpu.calls import Call
from benchmarks.runner import Settings
from benchmarks.stages import STAGES
from benchmarks.suites import SUITES

SYNC = "called a synchronizing CUDA operation"


class FakeCuda:
    """Sync debug mode, memory counters and events as ``torch.cuda`` has them."""

    def __init__(self) -> None:
        self.mode = 0
        self.modes: list[Any] = []
        self.allocated = 1000
        self.peak = 0
        self.time = 0.0

    def set_sync_debug_mode(self, mode: Any) -> None:
        self.modes.append(mode)
        self.mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)
        if self.mode:
            warnings.warn("Synchronization debug mode is a prototype: synchronizing", stacklevel=1)

    def synchronizing_operation(self) -> None:
        if self.mode == 2:
            raise RuntimeError(SYNC)
        if self.mode == 1:
            warnings.warn(SYNC, stacklevel=1)

    def allocate(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def reset_peak(self) -> None:
        self.peak = self.allocated


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    functions = {
        "get_sync_debug_mode": lambda: fake.mode,
        "set_sync_debug_mode": fake.set_sync_debug_mode,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda: fake.allocated,
        "max_memory_allocated": lambda: fake.peak,
        "reset_peak_memory_stats": fake.reset_peak,
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return fake


def test_host_waits_are_counted_and_the_mode_comes_back(cuda):
    def twice() -> None:
        cuda.synchronizing_operation()
        cuda.synchronizing_operation()

    assert probes.host_syncs(twice) == 2
    assert probes.host_syncs(lambda: None) == 0
    assert probes.sync_error(twice) == f"RuntimeError: {SYNC}"
    assert probes.sync_error(lambda: None) == ""
    assert cuda.mode == 0
    with pytest.raises(ZeroDivisionError), probes.sync_debug("error"):
        _ = 1 / 0
    assert cuda.mode == 0


def test_a_call_that_waits_is_not_recorded(cuda):
    call = Call(lambda: None, lambda _: cuda.synchronizing_operation())
    assert runner._in_graph([call], clock.HostClock(CPU)) == {"reason": "waits for the device"}
    free = Call(lambda: None, lambda _: None)
    found = runner._in_graph([free], clock.HostClock(CPU))
    assert found == {"reason": "RuntimeError: needs a CUDA device"}


def test_memory_is_what_a_forward_and_a_backward_add(cuda):
    leaf = torch.ones(3, requires_grad=True)

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            cuda.allocate(500)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            cuda.allocate(300)
            return grad * 2

    run: Any = SimpleNamespace(
        call=lambda: (Kept.apply(leaf),), outputs=("out",), flat_leaves=[leaf]
    )
    inputs: Any = SimpleNamespace(upstream={"out": torch.ones(3)})
    found = probes.memory_of(run, inputs)
    assert found == {"peak_bytes": 800, "saved_bytes": 500, "gradient_bytes": 12}


def test_a_profiler_that_sees_nothing_is_said(cuda, monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", FakeProfile)
    FakeProfile.found = []
    with pytest.raises(RuntimeError, match="no kernels"):
        probes.kernels_of(lambda: None)
    kinds = torch.autograd.DeviceType
    FakeProfile.found = [
        event("gemm", kinds.CUDA, 5),
        event("gemm", kinds.CUDA, 6),
        event("Memset (Device)", kinds.CUDA, 1),
        event("Memcpy DtoD", kinds.CUDA, 1),
        event("Context Sync", kinds.CUDA, 9),
        event("aten::mm", kinds.CPU, 50),
    ]
    found = probes.kernels_of(lambda: None)
    assert (found["kernels"], found["copies"]) == (2, 2)
    assert found["longest"][0]["name"] == "gemm"
    assert found["longest"][0]["seconds"] == pytest.approx(11e-6)


def event(name: str, kind: Any, microseconds: float) -> Any:
    spent = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, device_type=kind, time_range=spent)


class FakeProfile:
    found: list[Any] = []  # noqa: RUF012

    def __init__(self, activities: Any) -> None:
        assert activities == [torch.profiler.ProfilerActivity.CUDA]

    def __enter__(self) -> "FakeProfile":
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def events(self) -> list[Any]:
        return self.found


def test_probes_of_every_provider_and_the_kernels_of_ours(cuda, monkeypatch):
    kernels = {"kernels": 3, "copies": 0, "longest": [{"name": "k", "number": 3, "seconds": 1e-5}]}
    monkeypatch.setattr(probes, "kernels_of", lambda call: dict(kernels))
    entry = next(e for e in SUITES["gpu-smoke"] if e.stage == "expert_choice")
    stage = STAGES[entry.stage]
    inputs = stage.make_inputs(entry.shape, entry.torch_dtype)
    runs = {name: [stage.providers[name].build(inputs)] for name in ("minimal", "eager", "ours")}
    found = runner._probed(entry, stage, inputs, runs)
    assert {name: probe["mode"] for name, probe in found.items()} == {
        "minimal": "forward",
        "eager": "both",
        "ours": "both",
    }
    assert found["ours"]["sync_error"] == ""
    assert "longest" in found["ours"]
    assert "longest" not in found["eager"]


def test_graphs_probes_and_memory_stand_in_the_result(cuda, monkeypatch):
    """The runner's way on a GPU, over CPU tensors and a clock that says it is one."""
    entry = next(e for e in SUITES["gpu-smoke"] if e.stage == "dispatch")
    entry = replace(entry, memory=("ours",))
    stage = STAGES[entry.stage]
    on_cpu = replace(stage, make_inputs=lambda s, d, device, seed=0: stage.make_inputs(s, d))
    monkeypatch.setitem(STAGES, entry.stage, on_cpu)
    monkeypatch.setattr(runner, "query", lambda device, names: {"sm_mhz": 1980.0})
    monkeypatch.setattr(probes, "kernels_of", lambda call: {"kernels": 1, "copies": 0})
    monkeypatch.setattr(runner, "graph_time", lambda calls, clock: runner.summarize([1e-6, 3e-6]))
    monkeypatch.setattr(runner, "LAUNCH_BOUND_SECONDS", 1e9)
    bench = runner.Bench.on(CPU, Settings(repeats=5, seconds=0))
    pretended = clock.HostClock(torch.device("cuda"))
    bench = replace(bench, clock=pretended)
    result = runner.run_entry(entry, bench)
    forward = result["modes"]["forward"]
    assert forward["graph"]["ours"]["median"] == pytest.approx(2e-6)
    assert forward["state"] == {"sm_mhz": 1980.0}
    assert result["modes"]["backward"]["graph"] == {}
    assert result["probes"]["ours"]["host_syncs"] == 0
    assert set(result["memory"]["ours"]) == {"peak_bytes", "saved_bytes", "gradient_bytes"}
    assert result["figures"]["forward.graph_us"] == pytest.approx(2.0)
    assert result["figures"]["kernels"] == 1


def test_the_cuda_clock_flushes_more_than_the_cache(monkeypatch):
    class Event:
        now = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.now += 2.5
            self.at = Event.now

        def elapsed_time(self, other: "Event") -> float:
            return other.at - self.at

    sizes = []

    def empty(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        sizes.append(size * dtype.itemsize)
        return torch.ones(1)

    properties = SimpleNamespace(L2_cache_size=200 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", empty)
    found = clock.CudaClock(torch.device("cuda"))
    assert sizes == [400 * 2**20] == [found.flush_bytes]
    start = found.mark()
    assert found.seconds(start, found.mark()) == pytest.approx(2.5e-3)
    found.flush()
    properties.L2_cache_size = 4 * 2**20
    assert clock.CudaClock(torch.device("cuda")).flush_bytes == clock.MIN_FLUSH_BYTES


def test_the_header_names_the_gpu(monkeypatch):
    properties = SimpleNamespace(
        name="A GPU",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80 * 2**30,
        L2_cache_size=50 * 2**20,
        uuid="12-34",
    )
    commands = []

    def nvidia_smi(command, **_):
        commands.append(command)
        fields = command[-1].partition("=")[2].split(",")
        return SimpleNamespace(stdout=", ".join("580.1" for _ in fields))

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(hardware.subprocess, "run", nvidia_smi)
    found = hardware.describe(torch.device("cuda"))
    assert found["gpu"] == "A GPU"
    assert found["capability"] == "9.0"
    assert found["driver"] == "580.1"
    assert set(found["before"]) == set(hardware.QUERY)
    assert commands[0][1:3] == ["--id", "GPU-12-34"]
