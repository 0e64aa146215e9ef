"""What the Triton launchers start and keep: nothing depends on the number of tokens, or reads it.

Launches are recorded on meta tensors, as each GPU would get them; nothing runs.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.testing import make_logits

from . import expert_cases as cases

if (reason := BACKENDS["triton"].why_not("expert_mlp", "cpu")) is not None:
    pytest.skip(f"the triton backend {reason}", allow_module_level=True)

from moe_kernels.backends.triton.gemm_tiles import max_row_tiles
from moe_kernels.backends.triton.launch import Launch, Target, recorded

TARGETS = (
    Target("sm_80", 108),
    Target("sm_90", 132, descriptors=True),
    Target("sm_100", 148, descriptors=True),
    Target("sm_120", 170, descriptors=True),
    Target("gfx942", 304),
)
STAGES = BACKENDS["triton"].implementations()
EXPERTS, HIDDEN, INNER, TOP_K = 8, 72, 200, 2
ROUTERS = ("token_choice", "expert_choice")
COMMON = {"affinity": "softmax", "normalize": "per_token", "scale": 1.0, "check_finite": False}


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    # Autocast does not know the meta device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    with mk.use_backend("triton"):
        yield "triton"


def route(router: str, router_logits: Tensor, size: int) -> mk.RoutingPlan:
    """Route images of ``size`` tokens; experts that choose take 2 of each."""
    options = {**COMMON, "num_groups": router_logits.shape[0] // size}
    if router == "expert_choice":
        return STAGES["expert_choice"](router_logits, capacity=2, **options)
    options |= {"num_expert_groups": 1, "top_k_groups": 1, "selection_bias": None}
    return STAGES["token_choice"](router_logits, top_k=TOP_K, **options)


def layer(router: str, tokens: int, activation: str, dtype: torch.dtype, size: int = 8) -> None:
    """Every stage of a layer, forward and backward, on meta tensors."""
    into = 2 * INNER if activation == "swiglu" else INNER

    def leaf(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=to, device="meta", requires_grad=True)

    router_logits = leaf(tokens, EXPERTS, to=torch.float32)
    plan = route(router, router_logits, size)
    x, shared, residual = (leaf(tokens, HIDDEN) for _ in range(3))
    w_in, w_out = leaf(EXPERTS, into, HIDDEN), leaf(EXPERTS, HIDDEN, INNER)
    biases = {"bias_in": leaf(EXPERTS, into), "bias_out": leaf(EXPERTS, HIDDEN)}
    terms = {"shared": STAGES["activation"](shared, "gelu"), "residual": residual}
    rows = STAGES["dispatch"](x, plan)
    rows = STAGES["grouped_gemm"](rows, w_in, plan.expert_offsets, plan.rows_per_expert)
    outputs = [
        STAGES["expert_mlp"](x, plan, w_in, w_out, activation=activation, **biases, **terms),
        STAGES["combine"](rows, plan, None, None),
        STAGES["load_balance_loss"](plan, False, None),
        STAGES["load_balance_loss"](plan, True, None),
        STAGES["router_z_loss"](plan),
        STAGES["router_similarity_loss"](plan),
    ]
    leaves = [router_logits, x, shared, residual, w_in, w_out, *biases.values()]
    torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs])


def type_of(launch: Launch, name: str, value: Any) -> Any:
    """What Triton's compiler is told of an argument: its specialisation."""
    if isinstance(value, Tensor):
        # Allocations are aligned, so a view is where its offset in them is.
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        told = name not in (launch.kernel.kwargs["do_not_specialize_on_alignment"] or ())
        return value.dtype, aligned if told else None
    if isinstance(value, (int, float)):
        free = name in (launch.kernel.kwargs["do_not_specialize"] or ())
        return type(value), None if free else value
    if value is None:
        return None
    assert type(value).__name__ == "TensorDescriptor", (name, value)
    return value.base.dtype, tuple(value.block_shape)


def binaries(target: Target, *case: Any) -> list[Any]:
    """What is compiled for a layer, launch by launch."""
    with recorded(target) as launches:
        layer(*case)
    return [
        (
            launch.kernel.__name__,
            {name: type_of(launch, name, value) for name, value in launch.args.items()},
            launch.constants,
            (launch.num_warps, launch.num_stages),
        )
        for launch in launches
    ]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.arch)
@pytest.mark.parametrize(
    ("activation", "dtype"), [("swiglu", torch.bfloat16), ("gelu", torch.float32)], ids=str
)
@pytest.mark.parametrize(
    ("bucket", "counts"),
    [("some", (256, 512, 1000, 1024)), ("many", (1040, 1600, 4096)), ("few", (16, 64, 128))],
)
def test_the_number_of_tokens_is_no_specialisation(
    bucket, counts, activation, dtype, target, router
):
    first, *others = [binaries(target, router, tokens, activation, dtype) for tokens in counts]
    names = {name for name, *_ in first}
    assert {"_up_fwd_kernel", "_rows_gemm_kernel", "_down_bwd_kernel"} < names
    assert {"_weight_bwd_kernel", "_bias_bwd_kernel", "_gate_gradient_kernel"} < names
    for other in others:
        assert other == first


@pytest.mark.parametrize("router", ROUTERS)
def test_an_odd_number_of_tokens_is_no_specialisation_either(router):
    """A plan's indices are views of one buffer; where they start depends on the tokens."""
    case = ("swiglu", torch.bfloat16, 9)
    first, *others = [binaries(TARGETS[1], router, 9 * images, *case) for images in range(100, 105)]
    differing = {
        (kernel, name, told, by_first[name])
        for other in others
        for (kernel, types, *_), (_, by_first, *_) in zip(other, first, strict=True)
        for name, told in types.items()
        if told != by_first[name]
    }
    assert not differing
    assert all(other == first for other in others)


@pytest.mark.parametrize("router", ROUTERS)
def test_integer_arguments_are_not_specialised(router):
    with recorded(TARGETS[1]) as launches:
        layer(router, 1000, "swiglu", torch.bfloat16)
    for launch in launches:
        free = launch.kernel.kwargs["do_not_specialize"] or ()
        parameters = inspect.signature(launch.kernel.fn).parameters
        for name, value in launch.args.items():
            assert "constexpr" not in str(parameters[name].annotation), (launch.kernel, name)
            if isinstance(value, int):
                assert name in free, f"{launch.kernel.__name__} is specialised on {name}"


def test_meta_tensors_refuse_what_reads_the_host():
    """So that the layers above prove that nothing does."""
    tensor = torch.empty(3, device="meta")
    for read in (lambda t: t[0].item(), Tensor.tolist, Tensor.cpu, Tensor.nonzero, Tensor.numpy):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            read(tensor)


@pytest.mark.parametrize("router", ROUTERS)
def test_nothing_reads_the_host_while_kernels_run(router, monkeypatch):
    logits = make_logits(12, 3).requires_grad_()
    x = torch.randn(12, 5, requires_grad=True)
    w_in, w_out = torch.randn(3, 7, 5).requires_grad_(), torch.randn(3, 5, 7).requires_grad_()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the host was read")

    # `cpu` of a CPU tensor is what the interpreter itself calls on storages only.
    for name in ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, fail)
    options: dict[str, Any] = {"num_groups": 2, "check_finite": False}
    plan = (
        mk.token_choice(logits, 2, **options)
        if router == "token_choice"
        else mk.expert_choice(logits, 1.5, **options)
    )
    outputs = [
        mk.expert_mlp(x, plan, w_in, w_out),
        mk.combine(mk.dispatch(x, plan), plan),
        mk.load_balance_loss(plan),
        mk.router_z_loss(plan),
        mk.router_similarity_loss(plan),
    ]
    leaves = [logits, x, w_in, w_out]
    torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("router", ROUTERS)
def test_the_first_product_is_all_that_is_saved_of_the_rows(router, activation):
    make = mk.TokenChoiceRouter if router == "token_choice" else mk.ExpertChoiceRouter
    options = {"top_k": TOP_K} if router == "token_choice" else {}
    moe = mk.MoE(12, 20, 4, make(12, 4, **options), activation=activation, bias=True)
    into = 40 if activation == "swiglu" else 20
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with recorded(TARGETS[1]), hooks:
        _, plan = moe(torch.randn(2, 9, 12, requires_grad=True))
    rows, tokens = plan.num_rows, 18
    assert all(tensor.dtype in (torch.float32, torch.int32) for tensor in saved)
    floats = {tuple(tensor.shape) for tensor in saved if tensor.is_floating_point()}
    of_rows = {shape for shape in floats if shape[0] == rows and len(shape) > 1}
    assert of_rows == {(rows, into)}  # h
    parameters = {tuple(parameter.shape) for parameter in moe.parameters()}
    transposed = {shape[::-1] for shape in parameters if len(shape) == 2}
    small = {(tokens, 12), (2, 9, 12), (tokens, 4), (2, 9, 4), (rows,), ()}  # x, logits, weights
    assert floats - of_rows <= parameters | transposed | small
    assert (tokens, 12) in floats


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    block_m=st.sampled_from([16, 32, 64, 128]),
)
def test_the_grid_of_a_ragged_product_covers_every_tile(groups, block_m):
    tiles = sum(-(-rows // block_m) for rows in groups)
    bound = max_row_tiles(sum(groups), len(groups), 0, block_m)
    assert tiles <= bound <= sum(groups) // block_m + len(groups)
    assert (bound == 0) == (sum(groups) == 0)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 1000),
    experts=st.integers(1, 64),
    block_m=st.sampled_from([16, 32, 64, 128]),
)
def test_the_grid_of_an_equal_product_is_exact(rows, experts, block_m):
    tiles = experts * -(-rows // block_m)
    assert max_row_tiles(rows * experts, experts, rows, block_m) == tiles
