"""Whole layers on a GPU: accuracy, host waits, CUDA graphs, ``torch.compile``, recompilation."""

import copy
import gc
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.testing import ERROR_FLOOR, relative_error

from .gpu_cases import DEVICES, LAYERS, ROUTED_BY, draw, layer_step, make_layer

# B, S, D, F, E.
SHAPE = {"cuda": (4, 128, 256, 512, 8), "cpu": (2, 8, 16, 32, 3)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Equal computations whose plain matrix products may add in another order.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True, params=ROUTED_BY)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    torch._dynamo.reset()
    with mk.use_backend(request.param):
        yield


def setting(
    device: str, kind: str, dtype: torch.dtype, shared: bool = False
) -> tuple[mk.MoE, Tensor, Tensor]:
    """A layer, tokens and an upstream gradient."""
    batch_size, seq_len, hidden, inner, experts = SHAPE[device]
    options = {"shared_intermediate_size": inner} if shared else {}
    layer = make_layer(device, kind, dtype, hidden, inner, experts, **options)
    x = draw(device, batch_size, seq_len, hidden, dtype=dtype).requires_grad_()
    return layer, x, draw(device, batch_size, seq_len, hidden, dtype=dtype)


def exact_step(layer: mk.MoE, x: Tensor, upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The same step by the reference in another precision."""
    wide = copy.deepcopy(layer).to(dtype)
    with mk.use_backend("reference"):
        return layer_step(wide, x.detach().to(dtype).requires_grad_(), upstream.to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_is_as_accurate_as_plain_pytorch(device, kind, dtype):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bf16 wrongly")
    layer, x, upstream = setting(device, kind, dtype, shared=True)
    found = layer_step(layer, x, upstream)
    plain = exact_step(layer, x, upstream, dtype)
    exact = exact_step(layer, x, upstream, torch.float64)
    for number, (actual, ours, right) in enumerate(zip(found, plain, exact, strict=True)):
        allowed = max(2 * relative_error(ours, right), 2 * ERROR_FLOOR[dtype])
        assert relative_error(actual, right) <= allowed, number
    assert all(map(torch.equal, found, layer_step(layer, x, upstream)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_never_waits_for_the_device(kind):
    layer, x, upstream = setting("cuda", kind, torch.bfloat16, shared=True)
    layer_step(layer, x, upstream)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer_step(layer, x, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_is_recorded_in_a_cuda_graph_and_replayed(kind):
    layer, x, upstream = setting("cuda", kind, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer_step(layer, x, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()  # a collected kernel unloads its module, which ends the recording
    try:
        with torch.cuda.graph(graph, stream=stream):
            recorded = layer_step(layer, x, upstream)
    finally:
        gc.enable()
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            upstream.copy_(torch.randn_like(upstream))
        graph.replay()
        replayed = [tensor.clone() for tensor in recorded]
        for actual, right in zip(replayed, layer_step(layer, x, upstream), strict=True):
            assert relative_error(actual, right) < CLOSE[torch.bfloat16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_without_breaks_it_computes_the_same(device, kind):
    # Inductor on a CPU writes C++, which takes half a minute; what it is given is the same.
    backend = "inductor" if device == "cuda" else "aot_eager"
    dtype = torch.float32
    layer, x, upstream = setting(device, kind, dtype, shared=True)
    compiled: Callable[..., Any] = torch.compile(layer, fullgraph=True, backend=backend)
    expected, found = layer_step(layer, x, upstream), layer_step(compiled, x, upstream)
    for number, (actual, right) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(actual, right) < CLOSE[dtype], number
    with torch.no_grad():
        assert relative_error(compiled(x)[0], expected[0]) < CLOSE[dtype]


def kernel_variants() -> int:
    """How many binaries the kernels of the backend have in this process."""
    package = importlib.import_module("moe_kernels.backends.triton")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    kernels = {
        id(value): value
        for name, module in list(sys.modules.items())
        if name.startswith(f"{package.__name__}.")
        for value in vars(module).values()
        if hasattr(value, "device_caches")
    }
    # The first of what a kernel keeps for a device is its binaries by signature.
    return sum(
        len(kept[0]) for kernel in kernels.values() for kept in kernel.device_caches.values()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("first", "later"),
    [
        ([(8, 256)], [(6, 250), (9, 240), (12, 200)]),
        # The plan's index tensors are parts of one buffer; what an odd number of tokens does to
        # their alignment may make a variant of its own, once for each remainder by four.
        ([(8, 256), (7, 251), (5, 251)], [(7, 243), (5, 243), (11, 171), (9, 173)]),
    ],
    ids=["even", "odd"],
)
def test_another_number_of_tokens_compiles_nothing(kind, first, later):
    """All sizes are in one bucket of rows an expert and of tokens an image."""
    layer, _, _ = setting("cuda", kind, torch.bfloat16)
    hidden = SHAPE["cuda"][2]

    def step(batch_size: int, seq_len: int) -> None:
        x = draw("cuda", batch_size, seq_len, hidden, dtype=torch.bfloat16).requires_grad_()
        layer_step(layer, x, torch.randn_like(x))

    for size in first:
        step(*size)
    before = kernel_variants()
    assert before > 0
    for size in later:
        step(*size)
    assert kernel_variants() == before


@pytest.mark.gpu
def test_it_runs_on_the_current_stream():
    layer, x, upstream = setting("cuda", "token choice", torch.bfloat16)
    expected = layer_step(layer, x, upstream)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        later = x.detach().clone().mul_(1.0).requires_grad_()
        found = layer_step(layer, later, upstream)
    stream.synchronize()
    for actual, right in zip(found, expected, strict=True):
        assert relative_error(actual, right) < CLOSE[torch.bfloat16]


@pytest.mark.gpu
def test_autocast_runs_the_products_in_its_dtype():
    layer, x, upstream = setting("cuda", "token choice", torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        out, _ = layer(x)
    assert out.dtype == torch.float32
    exact, _ = layer(x)
    assert 1e-6 < relative_error(out, exact) < CLOSE[torch.bfloat16]
    out.backward(upstream)
    assert all(parameter.grad is not None for parameter in layer.parameters())
