"""Rounds in which every provider is timed once, on the device and on the host.

The device's time of a call lies between two marks, with a cold cache. What is enqueued before it
(the flush, repeated for calls that keep the host longer) lets the host get ahead, so the time holds
no waiting for launches, unless the call itself waits for the device. What launches cost stands
beside it: the host's time is how long a call keeps the host while the device is idle, and no loop
calls an op more often than that.
"""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.gpu.calls import Call
from benchmarks.gpu.clock import Clock
from benchmarks.ratios import quantile
from benchmarks.timing import no_garbage_collection

MIN_ROUNDS = 5
WARMUP_ROUNDS = 3
HOST_ROUNDS = 10
MAX_LEAD = 50  # flushes before one call; of 256 MiB and at 2.5 TB/s they take 5 ms

HostClock = Callable[[], float]
Calls = Mapping[str, Sequence[Call]]


@dataclass
class Samples:
    """Seconds of every provider in every round."""

    device: dict[str, list[float]] = field(default_factory=dict)
    host: dict[str, list[float]] = field(default_factory=dict)


def measure(
    calls: Calls,
    clock: Clock,
    *,
    repeats: int,
    seconds: float,
    host_clock: HostClock = time.perf_counter,
) -> Samples:
    """Time every provider once a round, in an order that changes, over rotating inputs.

    It ends after ``repeats`` rounds or ``seconds``, whichever comes first, but not before
    ``MIN_ROUNDS``.

    Args:
        calls: of every provider, one for each set of inputs.
        clock: of the device.
        repeats, seconds: when to stop.
        host_clock: in seconds.
    """
    shuffle = random.Random(0)  # everybody gets every predecessor
    samples = Samples({name: [] for name in calls}, {name: [] for name in calls})
    with no_garbage_collection():
        for number in range(WARMUP_ROUNDS):
            _device_round(list(calls), calls, number, clock, dict.fromkeys(calls, 1))
        for number in range(HOST_ROUNDS):
            for name in shuffle.sample(list(calls), len(calls)):
                spent = _host_seconds(calls[name], number, clock, host_clock)
                samples.host[name].append(spent)
        leads = _leads(samples.host, clock)
        end = host_clock() + seconds
        for number in range(max(repeats, MIN_ROUNDS)):
            order = shuffle.sample(list(calls), len(calls))
            for name, spent in _device_round(order, calls, number, clock, leads).items():
                samples.device[name].append(spent)
            if number + 1 >= MIN_ROUNDS and host_clock() > end:
                break
    return samples


def _device_round(
    order: Sequence[str], calls: Calls, number: int, clock: Clock, leads: Mapping[str, int]
) -> dict[str, float]:
    marks = {}
    for name in order:
        call = calls[name][number % len(calls[name])]
        prepared = call.prepare()
        for _ in range(leads[name]):
            clock.flush()
        start = clock.mark()
        result = call.run(prepared)
        marks[name] = start, clock.mark()
        del result, prepared
    clock.wait()
    return {name: clock.seconds(start, end) for name, (start, end) in marks.items()}


def _host_seconds(calls: Sequence[Call], number: int, clock: Clock, host_clock: HostClock) -> float:
    call = calls[number % len(calls)]
    prepared = call.prepare()
    clock.wait()
    start = host_clock()
    result = call.run(prepared)
    spent = host_clock() - start
    clock.wait()
    del result
    return spent


def _leads(host: Mapping[str, Sequence[float]], clock: Clock) -> dict[str, int]:
    """How many flushes last as long as the host needs for a call, and one more."""
    start = clock.mark()
    for _ in range(4):
        clock.flush()
    end = clock.mark()
    clock.wait()
    flush = clock.seconds(start, end) / 4
    if flush < 1e-5:  # a clock that has nothing to flush
        return dict.fromkeys(host, 1)
    return {
        name: 1 + min(MAX_LEAD, math.ceil(quantile(values, 0.5) / flush))
        for name, values in host.items()
    }
