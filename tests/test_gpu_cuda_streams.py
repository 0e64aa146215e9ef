"""CUDA C++ kernels beside other work on a GPU: streams, graphs, compiled steps, cost of a call.

A kernel of these finds out by a counter in global memory which of its blocks is the last. Streams,
replays and captures that shared one would give wrong losses, so everything here compares bits.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from benchmarks.gpu.probes import kernels_of, sync_debug
from moe_kernels.backends import BACKENDS

from .gpu_cases import draw

if (reason := BACKENDS["cuda"].why_not("expert_choice", "cuda")) is not None:
    pytest.skip(f"the cuda backend {reason}", allow_module_level=True)

from moe_kernels.backends.cuda import native
from moe_kernels.backends.cuda import route as cuda_route

pytestmark = pytest.mark.gpu

WIDTH = 64
RUNS = 20
# (T, E) of the logits, and the router: clusters, the grid, the grid inside a pool, token choice.
ROUTES: dict[str, tuple[tuple[int, int], Callable[[Tensor], mk.RoutingPlan]]] = {
    "clusters": ((64 * 256, 8), lambda logits: mk.expert_choice(logits, num_groups=64)),
    "grid": ((4 * 4096, 16), lambda logits: mk.expert_choice(logits, num_groups=4)),
    "long pool": ((40_000, 8), lambda logits: mk.expert_choice(logits, normalize="per_token")),
    "token choice": (
        (8192, 64),
        lambda logits: mk.token_choice(logits, 2, num_groups=4, normalize="per_token"),
    ),
}
each_route = pytest.mark.parametrize("name", ROUTES)


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    torch._dynamo.reset()
    with mk.use_backend("cuda"):
        yield


@pytest.fixture
def unpoisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are of what users get: no kernel that fills new memory with NaN."""
    monkeypatch.undo()


def logits_for(name: str) -> Tensor:
    return draw("cuda", *ROUTES[name][0])


def route_step(name: str, logits: Tensor) -> list[Tensor]:
    """Routing with losses, dispatch, combine and the gradient of all of it."""
    leaf = logits.detach().requires_grad_()
    plan = ROUTES[name][1](leaf)
    assert plan.fused is not None
    rows = mk.dispatch(leaf.detach()[:, :1].expand(-1, WIDTH), plan)
    out = mk.combine(rows, plan)
    outputs = [plan.routing_weights, plan.fused.load_balance, plan.fused.z_loss, out]
    gradient = torch.autograd.grad(outputs, leaf, [output.detach() for output in outputs])
    found = [*outputs, *gradient, plan.fused.terms, plan.fused.packed]
    return [tensor.detach() for tensor in found]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32)), number


def new_stream() -> torch.cuda.Stream:
    """A stream that begins when the current one is through."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


class Recorded:
    """A step in a CUDA graph: its input, its outputs, and the replay."""

    def __init__(self, name: str, logits: Tensor) -> None:
        self.input = logits.clone()
        stream = new_stream()
        with torch.cuda.stream(stream):  # what a first call does cannot be recorded
            route_step(name, self.input)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = route_step(name, self.input)

    def replay(self, logits: Tensor | None = None) -> list[Tensor]:
        """Copies of what a replay gives."""
        if logits is not None:
            self.input.copy_(logits)
        self.graph.replay()
        return [output.clone() for output in self.outputs]


class Page:
    """Counters of the module, for ``torch.as_tensor``."""

    def __init__(self, address: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (native.PAGE,),
            "typestr": "<i4",
            "data": (address, False),
            "version": 3,
        }


def counters() -> list[Tensor]:
    """Every counter that a launch has used or may use."""
    pages = native.counters.pages[torch.cuda.current_device()]
    return [torch.as_tensor(Page(address), device="cuda") for address in pages]


@each_route
def test_twenty_runs_have_the_same_bits(name):
    logits = logits_for(name)
    first = route_step(name, logits)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in first)
    for _ in range(RUNS - 1):
        assert_same_bits(route_step(name, logits), first)
    assert not bool(torch.cat(counters()).any())


@contextmanager
def other_work() -> Iterator[None]:
    """Products on a stream of their own, enough to last."""
    a = draw("cuda", 4096, 4096, dtype=torch.bfloat16)
    stream = new_stream()
    with torch.cuda.stream(stream):
        for _ in range(100):
            product = a @ a
    yield
    stream.synchronize()
    assert product.shape == a.shape


@each_route
def test_another_stream_beside_other_work_gives_the_same_bits(name):
    logits = logits_for(name)
    expected = route_step(name, logits)
    stream = new_stream()
    with other_work(), torch.cuda.stream(stream):
        found = [route_step(name, logits) for _ in range(RUNS)]
    stream.synchronize()
    for one in found:
        assert_same_bits(one, expected)


@each_route
@pytest.mark.parametrize("other", ROUTES)
def test_two_streams_at_the_same_time_do_not_disturb_each_other(name, other):
    names = (name, other)
    logits = [logits_for(one) for one in names]
    expected = [route_step(*pair) for pair in zip(names, logits, strict=True)]
    streams = [new_stream() for _ in names]
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(RUNS):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[number].append(route_step(names[number], logits[number]))
    torch.cuda.synchronize()
    for runs, right in zip(found, expected, strict=True):
        for one in runs:
            assert_same_bits(one, right)


@each_route
def test_a_graph_gives_the_bits_of_eager_calls_for_every_input(name):
    recorded = Recorded(name, logits_for(name))
    for _ in range(4):
        logits = logits_for(name)
        found = recorded.replay(logits)
        assert_same_bits(found, route_step(name, logits))
        assert_same_bits(recorded.replay(), found)


@each_route
def test_two_graphs_are_replayed_on_two_streams_at_once(name):
    logits = [logits_for(name) for _ in range(2)]
    recorded = [Recorded(name, one) for one in logits]
    expected = [route_step(name, one) for one in logits]
    streams = [new_stream() for _ in recorded]
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(RUNS):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[number].append(recorded[number].replay())
    torch.cuda.synchronize()
    for runs, right in zip(found, expected, strict=True):
        for one in runs:
            assert_same_bits(one, right)


@each_route
def test_a_graph_is_replayed_beside_eager_calls(name):
    logits = [logits_for(name) for _ in range(2)]
    recorded = Recorded(name, logits[0])
    expected = [route_step(name, one) for one in logits]
    stream = new_stream()
    eager, replayed = [], []
    for _ in range(RUNS):
        with torch.cuda.stream(stream):
            replayed.append(recorded.replay())
        eager.append(route_step(name, logits[1]))
    torch.cuda.synchronize()
    for one, other in zip(replayed, eager, strict=True):
        assert_same_bits(one, expected[0])
        assert_same_bits(other, expected[1])


def test_a_captured_launch_makes_counters_when_none_are_left(monkeypatch):
    name = "clusters"
    logits = logits_for(name)
    route_step(name, logits)  # makes the counters of this stream
    monkeypatch.setattr(native.counters, "_unused", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = route_step(name, logits)
    for _ in range(3):
        graph.replay()
        assert_same_bits(outputs, route_step(name, logits))


@each_route
def test_no_call_makes_the_host_wait(name):
    logits = logits_for(name)
    route_step(name, logits)  # the first one of a stream makes counters
    torch.cuda.synchronize()
    with sync_debug("error"):
        route_step(name, logits)


def allocations(call: Callable[[], Any]) -> int:
    """How many blocks of device memory a call asks PyTorch for."""
    gc.collect()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    kept = call()
    after = torch.cuda.memory_stats()["allocation.all.allocated"]
    del kept
    return after - before


def calls(name: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """Every op with the number of tensors that it makes, one workspace of a router among them."""
    logits = logits_for(name).requires_grad_()
    route = ROUTES[name][1]
    plan = route(logits)
    assert plan.fused is not None
    x = draw("cuda", logits.shape[0], WIDTH, dtype=torch.bfloat16)
    rows = mk.dispatch(x, plan)
    outputs = [plan.routing_weights, plan.fused.load_balance, plan.fused.z_loss]
    upstream = [torch.ones_like(output) for output in outputs]
    plan.token_indices  # noqa: B018 (cuts the plan's buffer into views)

    def backward() -> Any:
        return torch.autograd.grad(outputs, logits, upstream, retain_graph=True)

    return {
        "route": (lambda: route(logits), 6),
        "route_bwd": (backward, 1),
        "dispatch": (lambda: mk.dispatch(x, plan), 1),
        "combine": (lambda: mk.combine(rows, plan).detach(), 1),
    }


@each_route
def test_nothing_is_allocated_but_outputs_and_one_workspace(name, unpoisoned):
    for op, (call, made) in calls(name).items():
        call()
        assert allocations(call) == made, op


@each_route
def test_every_op_is_one_kernel(name, unpoisoned):
    for op, (call, _) in calls(name).items():
        call()
        try:
            kernels_of(call)  # the first one starts the profiler, which may miss something
            found = kernels_of(call)
        except RuntimeError as error:
            pytest.skip(str(error))
        assert (found["kernels"], found["copies"]) == (1, 0), (op, found)
        assert "moe" in found["longest"][0]["name"], (op, found)


@each_route
def test_another_gpu_than_the_current_one_serves(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    logits = logits_for(name)
    expected = route_step(name, logits)
    with torch.cuda.device(0):
        found = route_step(name, logits.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(tensor.device.index == 1 for tensor in found)
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_same_bits([tensor.to(logits.device) for tensor in found], expected)


@each_route
def test_a_capture_on_another_gpu_than_the_current_one_takes_counters_of_its_own(name, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    take, taken = native.counters.take, []

    def watched(place: tuple[int, int]) -> int:
        taken.append(take(place))
        return taken[-1]

    monkeypatch.setattr(native.counters, "take", watched)
    logits = logits_for(name).to("cuda:1")
    with torch.cuda.device(1):
        stream = new_stream()
        with torch.cuda.stream(stream):
            expected = route_step(name, logits)
        eager = set(taken)
        taken.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream), torch.cuda.device(0):
            outputs = route_step(name, logits)
        assert taken
        assert not eager & set(taken)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(outputs, expected)


# Nothing may run on these: every address is null.
SIZES = 64, native.MOST_EXPERTS + 1, 1  # T, E, G
REFUSED: dict[str, Callable[[], None]] = {
    "expert_choice": lambda: native.native.expert_choice_fwd(
        0, 0, *(0,) * 9, *SIZES, 2, 0, False, 1.0, 1
    ),
    "token_choice": lambda: native.native.token_choice_fwd(
        0, 0, *(0,) * 10, *SIZES, 2, 1, 1, 0, False, 1.0
    ),
}


def test_sizes_that_no_kernel_takes_are_refused_before_a_launch():
    logits = logits_for("clusters")
    expected = route_step("clusters", logits)
    most = native.MOST_EXPERTS
    for name, call in REFUSED.items():
        wanted = f"{name} got {most + 1} experts; the CUDA kernels take 1 to {most}"
        with pytest.raises(ValueError, match=wanted):
            call()
    with pytest.raises(ValueError, match=r"gather got dtype number 1; .* float32, bfloat16"):
        native.native.gather(0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 8)
    with pytest.raises(ValueError, match="2147483648 numbers; at most 1073741824"):
        native.native.sum_rows(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1 << 31)
    assert_same_bits(route_step("clusters", logits), expected)


@pytest.mark.parametrize(("name", "first_use"), [("token choice", False), ("clusters", True)])
def test_a_compiled_step_runs_in_cuda_graphs(name, first_use, monkeypatch, unpoisoned):
    route = ROUTES[name][1]

    def step(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        plan = route(logits)
        out = mk.combine(mk.dispatch(x, plan), plan, residual=x)
        return out, mk.load_balance_loss(plan) + mk.router_z_loss(plan)

    if first_use:  # counters are then made while PyTorch watches what is allocated
        monkeypatch.setattr(cuda_route, "counters", type(native.counters)())
    else:
        route(logits_for(name))
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    torch._dynamo.utils.counters.clear()
    for _ in range(5):
        logits = logits_for(name).requires_grad_()
        x = draw("cuda", logits.shape[0], WIDTH).requires_grad_()
        upstream = [torch.randn_like(x), torch.ones((), device="cuda")]
        found: list[list[Tensor]] = []
        for function in (compiled, step):
            torch.compiler.cudagraph_mark_step_begin()
            outputs = function(logits, x)
            gradients = torch.autograd.grad(outputs, [logits, x], upstream)
            found.append([tensor.detach().clone() for tensor in (*outputs, *gradients)])
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
