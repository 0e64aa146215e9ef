"""What the exchange asks of the host and of the network, and in which order."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

import moe_kernels as mk
from moe_kernels.distributed import exchange, shard_experts
from tests.ranks import run_ranks

from .parallel_layers import (
    EXPERTS,
    HIDDEN,
    SEQ,
    expert_mesh,
    gradients,
    make_layer,
    numbers,
    relative,
    worst,
)

BATCH = 3
# Ops and methods by which the host waits for a number of the device.
WAITING_OPS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten._unique2.default,
)
WAITING_METHODS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__")


class Watch(TorchDispatchMode):
    """Counts collectives, and what waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._methods = {name: getattr(Tensor, name) for name in WAITING_METHODS}

    def __enter__(self) -> "Watch":
        for name, method in self._methods.items():
            setattr(Tensor, name, self._counting(name, method))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, method in self._methods.items():
            setattr(Tensor, name, method)

    def _counting(self, name: str, method: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            self.waits[name] += 1
            return method(*args, **options)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counts = func is torch.ops.aten.repeat_interleave.Tensor and not (kwargs or {})
        if func in WAITING_OPS or counts:
            self.waits[str(func)] += 1
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collectives[str(func)] += 1
        return func(*args, **(kwargs or {}))


Counts = tuple[dict[str, int], dict[str, int]]


def watched(router: str, transport: str) -> tuple[Counts, Counts]:
    """Collectives and waits of a forward and of a backward."""
    # The reference: on a CPU the kernels of the others check indices on the host.
    mk.use_backend("reference")
    layer = make_layer(router)
    if transport != "none":
        shard_experts(layer, expert_mesh(), transport=transport)
    x = numbers(2, SEQ, HIDDEN, seed=1).requires_grad_()
    dout = numbers(2, SEQ, HIDDEN, seed=2)
    with Watch() as forward:
        out = layer(x)[0]
    with Watch() as backward:
        out.backward(dout)
    return tuple((dict(w.collectives), dict(w.waits)) for w in (forward, backward))  # type: ignore[return-value]


def test_static_waits_for_nothing_and_sends_twice() -> None:
    for transport in ("auto", "static"):
        for forward, backward in run_ranks(watched, 2, "expert_choice", transport):
            assert forward == ({"c10d.alltoall_base_.default": 2}, {})
            assert backward == ({"c10d.alltoall_base_.default": 2}, {})


def test_ragged_exchanges_counts_once_and_reads_once() -> None:
    # The reference's product over ragged rows reads its offsets on the host.
    ((forward, backward),) = run_ranks(watched, 1, "token_choice", "none")
    forward_waits, backward_waits = Counter(forward[1]), Counter(backward[1])
    assert forward_waits.keys() == {"tolist"}
    for router, transport in (("expert_choice", "ragged"), ("token_choice", "auto")):
        for forward, backward in run_ranks(watched, 2, router, transport):
            assert forward[0] == {"c10d.alltoall_base_.default": 3}
            assert Counter(forward[1]) == forward_waits + Counter(tolist=1)
            assert backward == ({"c10d.alltoall_base_.default": 2}, dict(backward_waits))


def bytes_to_others(router: str) -> int:
    """Bytes of rows that leave this rank in a step."""
    mk.use_backend("cpu,reference")
    layer = make_layer(router)
    shard_experts(layer, expert_mesh())
    total = 0
    send = torch.distributed.all_to_all_single

    def weighing(output: Tensor, rows: Tensor, *args: Any, **options: Any) -> Any:
        nonlocal total
        if rows.is_floating_point():
            splits = args[1] if len(args) > 1 and args[1] is not None else [len(rows) // 4] * 4
            others = len(rows) - splits[torch.distributed.get_rank()]
            total += others * rows.shape[1] * rows.element_size()
        return send(output, rows, *args, **options)

    exchange.distributed.all_to_all_single = weighing
    x = numbers(BATCH, SEQ, HIDDEN, seed=torch.distributed.get_rank()).requires_grad_()
    out = layer(x)[0]
    out.backward(numbers(BATCH, SEQ, HIDDEN, seed=2))
    return total


def test_bytes_are_those_of_the_formula() -> None:
    # 4·B·S·k·d·b·(W - 1)/W; expert choice takes floor(2·6/8) = 1 of 6 tokens, k = 8/6.
    capacity_factor = EXPERTS / SEQ
    expected = 4 * BATCH * SEQ * capacity_factor * HIDDEN * 8 * 3 / 4
    assert run_ranks(bytes_to_others, 4, "expert_choice") == [expected] * 4
    # For token choice on average over the ranks, when every rank gets as many rows.
    found = run_ranks(bytes_to_others, 4, "token_choice")
    assert abs(sum(found) / 4 / (4 * BATCH * SEQ * 2 * HIDDEN * 8 * 3 / 4) - 1) < 0.2


class RecordedWork:
    """A started collective whose end is written down."""

    def __init__(self, work: Any, events: list[str]) -> None:
        self.work = work
        self.events = events

    def wait(self) -> None:
        self.events.append("wait")
        self.work.wait()


def ordered(router: str) -> tuple[list[str], list[str]]:
    """Starts and ends of exchanges, and the shared expert's work, forward and backward."""
    mk.use_backend("cpu,reference")
    layer = make_layer(router)
    shard_experts(layer, expert_mesh())
    events: list[str] = []
    send = torch.distributed.all_to_all_single

    def recording(output: Tensor, rows: Tensor, *args: Any, **options: Any) -> Any:
        work = send(output, rows, *args, **options)
        if rows.dtype == torch.int32:
            events.append("counts")
            return work
        events.append("start")
        return RecordedWork(work, events)

    exchange.distributed.all_to_all_single = recording
    assert layer.shared_expert is not None
    layer.shared_expert.register_forward_hook(lambda *_: events.append("shared"))
    layer.shared_expert.register_full_backward_hook(lambda *_: events.append("shared"))
    x = numbers(2, SEQ, HIDDEN, seed=1).requires_grad_()
    out = layer(x)[0]
    forward = list(events)
    events.clear()
    out.backward(numbers(2, SEQ, HIDDEN, seed=2))
    return forward, events


def test_shared_expert_runs_while_rows_travel() -> None:
    for forward, backward in run_ranks(ordered, 2, "expert_choice"):
        assert forward == ["start", "shared", "wait", "start", "wait"]
        assert backward == ["start", "wait", "start", "shared", "wait"]
    for forward, _ in run_ranks(ordered, 2, "token_choice"):
        assert forward == ["counts", "start", "shared", "wait", "start", "wait"]


def strided() -> bool:
    """Rows and their gradients that do not lie one after the other."""
    expert_mesh()
    assert torch.distributed.group.WORLD is not None
    splits = exchange.Splits(torch.distributed.group.WORLD, [2, 2], [2, 2], are_equal=True)
    both, dboth = (numbers(2, HIDDEN, 4, seed=seed) for seed in (1, 2))  # (rank, D, rows)
    rank = torch.distributed.get_rank()
    rows = both[rank].T.requires_grad_()
    arrived = exchange.Travel(rows, splits, "rows").wait()
    arrived.backward(dboth[rank].T)
    half = slice(2 * rank, 2 * rank + 2)
    assert rows.grad is not None
    return torch.equal(arrived, both[:, :, half].transpose(1, 2).flatten(0, 1)) and torch.equal(
        rows.grad, dboth[:, :, half].transpose(1, 2).flatten(0, 1)
    )


def test_rows_of_any_strides() -> None:
    assert run_ranks(strided, 2) == [True, True]


def eager_shared() -> list[str]:
    """Without parallel experts nothing is put off: the shared expert runs before the others."""
    layer = make_layer("token_choice")
    events: list[str] = []
    assert layer.shared_expert is not None
    layer.shared_expert.register_forward_hook(lambda *_: events.append("shared"))
    layer.experts.register_forward_pre_hook(
        lambda _, inputs: events.append(type(inputs[2]).__name__)
    )
    layer(numbers(1, SEQ, HIDDEN, seed=1))
    return events


def test_one_process_as_before() -> None:
    assert eager_shared() == ["shared", "Tensor"]


def compiled() -> tuple[list[int], float]:
    """Graphs compiled after each of three calls with other rows, and the largest error."""
    mk.use_backend("cpu,reference")
    layer, eager = make_layer("token_choice"), make_layer("token_choice")
    for each in (layer, eager):
        shard_experts(each, expert_mesh())
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        targets = [str(node.target) for node in graph.graph.nodes]
        assert not any("all_to_all" in target for target in targets), targets
        return aot_eager(graph, inputs)

    block = torch.compile(layer, backend=backend)
    seen, errors = [], []
    for seed in range(3):
        x, again = (numbers(2, SEQ, HIDDEN, seed=seed).requires_grad_() for _ in range(2))
        out, expected = block(x)[0], eager(again)[0]
        dout = numbers(2, SEQ, HIDDEN, seed=9)
        out.backward(dout)
        expected.backward(dout)
        assert x.grad is not None
        assert again.grad is not None
        errors += [relative(out, expected), relative(x.grad, again.grad)]
        seen.append(graphs)
    return seen, max(*errors, worst(gradients(layer), gradients(eager)))


def test_compiled_once_whatever_arrives() -> None:
    for seen, error in run_ranks(compiled, 2):
        # The router's graph and the shared expert's, at least.
        assert seen[0] >= 2
        assert seen == seen[:1] * 3
        assert error < 1e-12


def wrong_inputs() -> dict[str, str]:
    """What is said of inputs that one rank can see to be wrong."""
    layer, static = make_layer("token_choice"), make_layer("token_choice")
    shard_experts(layer, expert_mesh())
    shard_experts(static, expert_mesh(), transport="static")
    x = numbers(SEQ, HIDDEN, seed=1)
    logits = numbers(SEQ, 8, seed=2)
    plan = mk.token_choice(logits, 2)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was sent")

    torch.distributed.all_to_all_single = refuse
    calls = {
        "tokens": lambda: layer.experts(x[1:], plan),
        "experts": lambda: layer.experts(x, mk.token_choice(logits[:, :4].contiguous(), 2)),
        "width": lambda: layer.experts(x[:, 1:], plan),
        "dtype": lambda: layer.experts(x.float(), plan),
        "static": lambda: static.experts(x, plan),
    }
    said = {}
    for case, call in calls.items():
        with pytest.raises(ValueError) as error:  # noqa: PT011
            call()
        said[case] = str(error.value)
    return said


def test_errors_before_anything_is_sent() -> None:
    expected = {
        "tokens": "x has 5 tokens",
        "experts": "the plan is for 4 experts; the layer has 8, 4 on each of 2 ranks",
        "width": "x has 15 columns; the experts expect 16",
        "dtype": "x is torch.float32 and the experts are torch.float64",
        "static": "the static transport needs equally many rows",
    }
    for said in run_ranks(wrong_inputs, 2):
        for case, words in expected.items():
            assert words in said[case]
