"""The megablocks backend: on a CPU with a stand-in for megablocks, on a GPU with itself."""

import functools
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import moe_kernels as mk
from moe_kernels import backends
from moe_kernels.backends import BACKENDS, capabilities
from moe_kernels.doctor import diagnosis, self_test
from moe_kernels.ops.layout import is_transposed
from moe_kernels.testing import make_logits

from ..gpu_cases import assert_mlp_accurate, mlp_tensors, ragged_plan
from . import expert_cases as cases
from . import megablocks_standin as standin
from .expert_parts import as_parts, split

HIDDEN, INNER = 20, 35
ROWS = (0, 1, 17, 16, 0)
BF16 = torch.bfloat16
INSTALL = "pip install --no-deps --no-build-isolation grouped_gemm==0.3.0"

if (reason := BACKENDS["cpu"].why_not("dispatch", "cpu")) is not None:
    pytest.skip(f"the cpu backend {reason}", allow_module_level=True)


@pytest.fixture(autouse=True)
def backend() -> None:
    """The tests choose by themselves."""


@pytest.fixture
def megablocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with standin.installed(monkeypatch):
        yield


def check(plan: mk.RoutingPlan, activation: str = "swiglu", **options: Any) -> cases.Tensors:
    """The backend is as accurate as plain PyTorch, forward and in every gradient."""
    tensors = cases.make_tensors(plan, HIDDEN, INNER, activation, BF16, bias=False, **options)
    case = torch.randn(tensors["x"].shape).to(BF16), activation
    found = cases.results(plan, tensors, *case, "megablocks")
    cases.assert_accurate(found, plan, tensors, *case)
    return found


@pytest.mark.usefixtures("megablocks")
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_is_as_accurate_as_the_reference(activation):
    found = check(cases.ragged_plan(ROWS), activation, terms=cases.TERMS)
    assert standin.calls == ["rows^T"] * 2 + ["rows", "weights", "weights", "rows"]
    for name in ("w_in", "w_out"):
        for expert, rows in enumerate(ROWS):
            assert bool(found[name][expert].any()) == bool(rows), (name, expert)


@pytest.mark.usefixtures("megablocks")
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(9, 4, 4), (1, 4, 2), (40, 1, 1)])
def test_shapes_at_the_edges(tokens, experts, top_k):
    check(mk.token_choice(make_logits(tokens, experts), top_k, backend="reference"))


@pytest.mark.usefixtures("megablocks")
def test_no_token_at_all():
    plan = mk.token_choice(make_logits(0, 4), 2, backend="reference")
    tensors = cases.make_tensors(plan, HIDDEN, INNER, dtype=BF16, bias=False)
    found = cases.results(plan, tensors, tensors["x"].clone(), "swiglu", "megablocks")
    assert found["out"].shape == (0, HIDDEN)
    assert not found["w_in"].any()
    assert not found["w_out"].any()
    assert standin.calls == []  # grouped_gemm refuses an empty product


@pytest.mark.usefixtures("megablocks")
@pytest.mark.parametrize("turn", [("w_in",), ("w_out",), ("w_in", "w_out")])
def test_transposed_weights_are_read_where_they_lie(turn):
    plan = cases.ragged_plan(ROWS)
    tensors = cases.make_tensors(plan, HIDDEN, INNER, dtype=BF16, bias=False)
    for name in turn:
        tensors[name] = tensors[name].mT.contiguous().mT
    case = torch.randn(tensors["x"].shape).to(BF16), "swiglu"
    found = cases.results(plan, tensors, *case, "megablocks")
    cases.assert_accurate(found, plan, tensors, *case)
    for name in ("w_in", "w_out"):
        assert is_transposed(found[name]) == (name in turn), name
    products = ["rows" if name in turn else "rows^T" for name in ("w_in", "w_out")]
    assert standin.calls[:2] == products


@pytest.mark.usefixtures("megablocks")
def test_tensors_that_are_not_contiguous():
    plan = cases.ragged_plan(ROWS)
    tensors = cases.make_tensors(plan, HIDDEN, INNER, dtype=BF16, bias=False)
    upstream = torch.randn(tensors["x"].shape).to(BF16)

    def strided(tensor: Tensor) -> Tensor:
        return tensor.detach().repeat_interleave(2, dim=-1)[..., ::2]

    plain = cases.results(plan, tensors, upstream, "swiglu", "megablocks")
    found = cases.results(plan, tensors, strided(upstream), "swiglu", "megablocks", make=strided)
    cases.assert_same_bits(found, plain)


@pytest.mark.usefixtures("megablocks")
def test_lists_of_matrices():
    plan = cases.ragged_plan(ROWS)
    tensors = cases.make_tensors(plan, HIDDEN, INNER, dtype=BF16, bias=False)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    lists = split(leaves["w_in"], 2), split(leaves["w_out"], 1)
    results = []
    for w_in, w_out in (lists, (leaves["w_in"], leaves["w_out"])):
        parts = [*w_in, *w_out] if isinstance(w_in, list) else [w_in, w_out]
        x, run = leaves["x"], {"activation": "swiglu", "backend": "megablocks"}
        out = mk.expert_mlp(x, plan, w_in, w_out, **run)
        gradients = torch.autograd.grad(out, [x, *parts], torch.ones_like(out))
        results.append([out, *(torch.cat([g.flatten() for g in gradients]),)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.usefixtures("megablocks")
def test_equal_runs_give_equal_bits():
    plan = mk.token_choice(make_logits(33, 5), 3, backend="reference")
    tensors = cases.make_tensors(plan, HIDDEN, INNER, dtype=BF16, bias=False)
    case = torch.randn(tensors["x"].shape).to(BF16), "swiglu", "megablocks"
    cases.assert_same_bits(cases.results(plan, tensors, *case), cases.results(plan, tensors, *case))


@pytest.mark.usefixtures("megablocks")
@pytest.mark.parametrize(
    ("wanted", "products"),
    [
        (("routing_weights",), ["rows"]),
        (("w_out",), ["weights"]),
        (("x",), ["rows", "rows"]),
        (("w_in",), ["rows", "weights"]),
    ],
)
def test_only_what_is_wanted_is_computed(wanted, products):
    plan = cases.ragged_plan(ROWS)
    tensors = cases.make_tensors(plan, HIDDEN, INNER, dtype=BF16, bias=False)
    upstream = torch.randn(tensors["x"].shape).to(BF16)
    every = cases.results(plan, tensors, upstream, "swiglu", "megablocks")
    leaves = [tensors[name].requires_grad_() for name in wanted]
    object.__setattr__(plan, "routing_weights", tensors["routing_weights"])
    out = run(tensors, plan)
    standin.calls.clear()
    gradients = torch.autograd.grad(out, leaves, upstream)
    assert standin.calls == products
    for name, gradient in zip(wanted, gradients, strict=True):
        assert torch.equal(gradient, every[name]), name


def run(tensors: cases.Tensors, plan: mk.RoutingPlan, **options: Any) -> Tensor:
    weights = {name: tensors[name] for name in cases.WEIGHTS if name in tensors}
    options = {"activation": "swiglu", "backend": "megablocks", **options}
    return mk.expert_mlp(tensors["x"], plan, **weights, **options)


@pytest.mark.usefixtures("megablocks")
def test_autocast_multiplies_in_bf16():
    plan = cases.ragged_plan(ROWS)
    tensors = cases.make_tensors(plan, HIDDEN, INNER, bias=False)
    leaves = [tensors[name].requires_grad_() for name in ("x", "w_in", "w_out")]
    with torch.autocast("cpu", dtype=BF16):
        out = run(tensors, plan)
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert {out.dtype, *(g.dtype for g in gradients)} == {torch.float32}
    low = {
        n: t.detach() if n == "routing_weights" else t.detach().to(BF16) for n, t in tensors.items()
    }
    assert torch.equal(out, run(low, plan).float())
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(
            mk.BackendUnavailable,
            match=r"and the tokens are torch\.float16: cast tokens and weights",
        ),
    ):
        run(tensors, plan)


@pytest.mark.usefixtures("megablocks")
def test_multiplies_on_the_device_of_the_tensors(monkeypatch):
    device_of, multiplied = torch.cuda.device_of, []

    def spy(tensor: Tensor) -> Any:
        multiplied.append(tensor.device.type)
        return device_of(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", spy)
    check(cases.ragged_plan(ROWS))
    assert multiplied == ["cpu"] * len(standin.calls)


@pytest.mark.usefixtures("megablocks")
def test_compiled_in_one_graph():
    plan = cases.ragged_plan(ROWS)
    tensors = cases.make_tensors(plan, HIDDEN, INNER, dtype=BF16, bias=False)
    leaves = [tensors[name].requires_grad_() for name in ("x", "w_in", "w_out")]
    results = []
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for function in (run, compiled):
        out = function(tensors, plan)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.usefixtures("megablocks")
def test_opcheck():
    backends.resolve("expert_mlp", torch.device("cpu"), "megablocks")
    plan = cases.ragged_plan((0, 3, 2))
    tensors = cases.make_tensors(plan, 4, 6, dtype=BF16, bias=False)
    x, w_in, w_out = (tensors[name].requires_grad_() for name in ("x", "w_in", "w_out"))
    weights = tensors["routing_weights"].requires_grad_()
    indices = plan.token_indices, plan.row_indices, plan.row_offsets, plan.expert_offsets
    args = (x, weights, w_in, w_out, None, None, None, None, *indices, 0, "swiglu")
    plain = [a.detach() if isinstance(a, Tensor) else a for a in args]
    out, h = torch.ops.moe_kernels.expert_mlp.megablocks(*plain)
    samples = {"expert_mlp": args, "expert_mlp_parts": as_parts(args, 2)}
    for name, sample in samples.items():
        opcheck(getattr(torch.ops.moe_kernels, name).megablocks, sample)
    for wanted in ([True] * 4 + [False] * 2, [False, True, False, False, False, False]):
        bwd_args = (torch.randn_like(out), h, wanted, *plain[:6], *plain[8:])
        opcheck(torch.ops.moe_kernels.expert_mlp_bwd.megablocks, bwd_args)
        opcheck(torch.ops.moe_kernels.expert_mlp_parts_bwd.megablocks, as_parts(bwd_args, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_the_library_itself_on_a_gpu(activation):
    reason = BACKENDS["megablocks"].why_not("expert_mlp", "cuda")
    if reason is not None:
        pytest.skip(f"megablocks {reason}")
    plan = ragged_plan("cuda", 300, 5)  # one expert gets no row
    tensors = mlp_tensors(plan, 128, 192, activation, BF16)
    found = assert_mlp_accurate(plan, tensors, activation, "megablocks")
    assert not found["w_in"][1].any()
    assert not found["w_out"][1].any()
    turned = {name: tensors[name].mT.contiguous().mT for name in ("w_in", "w_out")}
    assert_mlp_accurate(plan, tensors | turned, activation, "megablocks")


# What it refuses


@pytest.mark.usefixtures("megablocks")
def test_what_it_cannot_compute_is_refused_with_the_reason():
    plan = cases.ragged_plan(ROWS)
    make = functools.partial(cases.make_tensors, plan, HIDDEN, INNER)
    refused = {
        r"multiplies torch\.bfloat16 only and the tokens are torch\.float32": make(bias=False),
        r"the tokens are torch\.float64": {n: t.double() for n, t in make(bias=False).items()},
        r"adds no biases: build the layer with bias=False": make(dtype=BF16),
    }
    for words, tensors in refused.items():
        with pytest.raises(mk.BackendUnavailable, match=words) as caught:
            run(tensors, plan)
        assert str(caught.value).startswith("backend 'megablocks' was requested for expert_mlp but")
        assert str(caught.value).endswith("see docs/megablocks.md.")
    chosen = torch.zeros(4, 3, dtype=torch.bool)
    chosen[0] = True
    others = {
        "expert_choice": cases.equal_plan(8, 3),
        "selection": mk.plan_from_selection(chosen, torch.rand(4, 3)),
    }
    for router, other in others.items():
        tensors = cases.make_tensors(other, HIDDEN, INNER, dtype=BF16, bias=False)
        with pytest.raises(
            mk.BackendUnavailable, match=f"plans of token choice only, not of router '{router}'"
        ):
            run(tensors, other)
    assert standin.calls == []


@pytest.mark.usefixtures("megablocks")
def test_other_ops_are_left_to_the_next_of_the_list():
    x, logits = torch.randn(6, HIDDEN).to(BF16), make_logits(6, 3)
    layer = mk.MoE(HIDDEN, INNER, 3, router=mk.TokenChoiceRouter(HIDDEN, 3, 2), activation="swiglu")
    with mk.use_backend("megablocks"), pytest.raises(mk.BackendUnavailable, match="has no kernel"):
        mk.token_choice(logits, 2)
    with mk.use_backend("megablocks,reference"):
        layer.to(BF16)(x.view(1, 6, HIDDEN))
    assert standin.calls == ["rows^T"] * 2


def test_is_never_chosen_automatically(monkeypatch):
    known = {name: BACKENDS[name] for name in ("megablocks", "reference")}
    monkeypatch.setattr(backends, "BACKENDS", known)
    standin.forget(monkeypatch)
    monkeypatch.setitem(backends._loaded, "megablocks", {"expert_mlp": abs})
    gpu = torch.device("cuda", 0)
    assert backends.serving("expert_mlp", gpu) == "reference"
    assert backends.serving("expert_mlp", gpu, "megablocks") == "megablocks"


def test_tensors_on_a_cpu_are_refused():
    with pytest.raises(mk.BackendUnavailable, match="runs on cuda only, not on cpu"):
        backends.resolve("expert_mlp", torch.device("cpu"), "megablocks")


# Where megablocks is missing, or broken

WHAT = "cannot run: grouped_gemm, megablocks' grouped product,"


def found_reason(monkeypatch: pytest.MonkeyPatch) -> str:
    """What the table says of the backend when it is looked for again."""
    for name in ("megablocks", "grouped_gemm", "grouped_gemm.backend"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    standin.forget(monkeypatch)
    reason = BACKENDS["megablocks"].why_no_kernel("expert_mlp")
    assert reason is not None
    return reason


class Raises:
    """A finder of modules with which ``import grouped_gemm`` raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "grouped_gemm":
            raise self.error


def test_a_missing_library_is_said_with_what_to_do(monkeypatch):
    missing = ModuleNotFoundError("No module named 'grouped_gemm'", name="grouped_gemm")
    monkeypatch.setattr(sys, "meta_path", [Raises(missing), *sys.meta_path])
    words = f"{WHAT} is not installed: {INSTALL} (docs/megablocks.md)"
    assert found_reason(monkeypatch) == words
    lines = capabilities.explain().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("megablocks: "))
    assert lines[at + 1] == f"  - every op: {words}"
    (checked,) = self_test._checks(BACKENDS["megablocks"], self_test._Expected())
    assert (checked.status, checked.detail) == ("not here", words)
    assert diagnosis._problem(checked) is None
    with pytest.raises(mk.BackendUnavailable, match="is not installed: pip install"):
        backends.resolve("expert_mlp", torch.device("cuda"), "megablocks")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ModuleNotFoundError("No module named 'grouped_gemm_backend'", name="other"),
            "(ModuleNotFoundError: No module named 'grouped_gemm_backend')",
        ),
        (OSError("undefined symbol\nand more"), "(OSError: undefined symbol)"),
        (SystemExit("no GPU"), "(SystemExit: no GPU)"),
    ],
)
def test_a_broken_library_is_said(monkeypatch, error, words):
    monkeypatch.setattr(sys, "meta_path", [Raises(error), *sys.meta_path])
    assert found_reason(monkeypatch) == (
        f"{WHAT} fails when imported {words}: build it again for this PyTorch, {INSTALL} "
        "(docs/megablocks.md)"
    )


def test_the_build_of_hugging_face_is_used(monkeypatch):
    used = []

    def gmm(*tensors: Tensor, **options: Any) -> Tensor:
        used.append(tensors[0].shape)
        return standin.gmm(*tensors, **options)

    package = ModuleType("megablocks")
    package.gg_backend = SimpleNamespace(gmm=gmm)
    with standin.installed(monkeypatch):
        monkeypatch.setitem(sys.modules, "megablocks", package)
        monkeypatch.setitem(sys.modules, "grouped_gemm", None)
        monkeypatch.delitem(sys.modules, "grouped_gemm.backend")
        standin.forget(monkeypatch)
        check(cases.ragged_plan(ROWS))
        assert len(used) == len(standin.calls) == 6


@pytest.mark.usefixtures("megablocks")
def test_the_doctor_tries_it():
    (checked,) = self_test._checks(BACKENDS["megablocks"], self_test._Expected())
    assert (checked.status, checked.device) == ("ok", "cpu")
    assert checked.detail.startswith("bfloat16: ")
    assert "weights" in standin.calls
