"""GPU timing with made-up clocks: interleaving, rotation, leads, limits, calls, time limits."""

import gc
import time
from typing import Any

import pytest
import torch

from benchmarks.entry import CPU, Cost
from benchmarks.gpu import graph, timing
from benchmarks.gpu.calls import Call, call_of
from benchmarks.gpu.clock import HostClock, clock_of
from benchmarks.gpu.limits import Limits
from benchmarks.gpu.time_limit import time_limit
from benchmarks.stages import STAGES
from benchmarks.suites import SUITES


class FakeDevice:
    """A device whose work takes the time it is told, behind a host that runs ahead."""

    device = CPU

    def __init__(self, flush_seconds: float = 1.0) -> None:
        self.flush_seconds = flush_seconds
        self.done = self.host = 0.0
        self.log: list[str] = []

    def flush(self) -> None:
        self.log.append("flush")
        self.work(self.flush_seconds)

    def work(self, seconds: float) -> None:
        # Work starts when the device is free, and not before the host has enqueued it.
        self.done = max(self.done, self.host) + seconds

    def mark(self) -> float:
        self.done = max(self.done, self.host)
        return self.done

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def wait(self) -> None:
        self.host = self.done

    def call(self, name: str, device: float, host: float) -> Call:
        def run(prepared: Any) -> None:
            self.log.append(name)
            self.host += host
            self.work(device)

        return Call(lambda: None, run)


def measured(fake: FakeDevice, calls: dict[str, list[Call]], repeats: int = 6) -> timing.Samples:
    return timing.measure(calls, fake, repeats=repeats, seconds=1e9, host_clock=lambda: fake.host)


def test_device_time_holds_no_launches_and_host_time_stands_beside_it():
    fake = FakeDevice()
    calls = {"ours": [fake.call("ours", 2.0, 0.5)], "slow host": [fake.call("slow", 2.0, 30.0)]}
    samples = measured(fake, calls)
    # Without a lead of thirty flushes, the slow host would show in the device's time.
    assert samples.device == {"ours": [2.0] * 6, "slow host": [2.0] * 6}
    assert set(samples.host["slow host"]) == {30.0}
    assert len(samples.host["ours"]) == timing.HOST_ROUNDS


def test_every_sample_has_a_cold_cache_and_everybody_every_predecessor():
    fake = FakeDevice()
    calls = {name: [fake.call(name, 1.0, 0.0)] for name in "abc"}
    measured(fake, calls, repeats=12)
    timed = fake.log[-12 * 6 :]
    assert timed[::2] == ["flush"] * 36
    orders = {tuple(timed[start + 1 : start + 6 : 2]) for start in range(0, 72, 6)}
    assert len(orders) > 3
    assert all(set(order) == set("abc") for order in orders)


def test_inputs_rotate():
    fake = FakeDevice()
    calls = {"ours": [fake.call(f"set {number}", 1.0, 0.0) for number in range(3)]}
    measured(fake, calls, repeats=6)
    assert [word for word in fake.log if word != "flush"][-6:] == ["set 0", "set 1", "set 2"] * 2


def test_rounds_end_with_the_time_but_not_before_the_least_number():
    fake = FakeDevice()
    calls = {"ours": [fake.call("ours", 1.0, 0.0)]}
    samples = timing.measure(calls, fake, repeats=100, seconds=0, host_clock=lambda: fake.host)
    assert len(samples.device["ours"]) == timing.MIN_ROUNDS
    assert gc.isenabled()


def test_what_is_prepared_is_not_timed():
    fake = FakeDevice()
    call = Call(lambda: fake.work(50.0), lambda prepared: fake.work(1.0))
    assert measured(fake, {"ours": [call]}).device["ours"] == [1.0] * 6


def test_limits_measure_once_and_compare_with_a_copy_of_that_size():
    clock = HostClock(CPU)
    limits = Limits(clock, product_size=64, largest_copy=2**18)
    cost = Cost(flops=1e6, bytes=100_000)
    assert limits.traffic_seconds(cost) == 100_000 / limits.copy_bytes(2**16)
    assert limits.traffic_seconds(Cost(0, 2**30)) == 2**30 / limits.copy_bytes(2**18)
    rate = limits.product_flops(torch.float32)
    assert limits.product_flops(torch.float32) == rate
    assert limits.seconds(cost, torch.float32) == max(1e6 / rate, limits.traffic_seconds(cost))


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_calls_do_what_their_mode_says(mode):
    entry = next(e for e in SUITES["gpu-smoke"] if e.stage == "token_choice")
    stage = STAGES[entry.stage]
    inputs = stage.make_inputs(entry.shape, entry.torch_dtype)
    call = call_of(stage.providers["eager"].build(inputs), inputs, mode)
    prepared = call.prepare()
    assert (prepared is not None) == (mode == "backward")
    result = call.run(prepared)
    assert all(not tensor.requires_grad for tensor in result)
    assert len(result) == (7 if mode == "forward" else 1)


def test_the_clock_fits_the_device_and_graphs_need_cuda():
    clock = clock_of(CPU)
    assert isinstance(clock, HostClock)
    start = clock.mark()
    time.sleep(0.002)
    assert clock.seconds(start, clock.mark()) >= 0.002
    with pytest.raises(RuntimeError, match="CUDA"):
        graph.graph_time([lambda: None], clock)


def test_a_time_limit_interrupts_and_leaves_nothing_behind():
    with pytest.raises(TimeoutError, match="longer than"), time_limit(0.05):
        time.sleep(30)
    with time_limit(0.05):
        pass
    time.sleep(0.08)
