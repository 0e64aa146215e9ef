"""Expert weights that models keep as (E, columns, rows): read where they lie, on every backend."""

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.ops.layout import is_transposed
from moe_kernels.testing import assert_as_accurate, relative_error

from . import expert_cases as cases

ROWS = (0, 1, 17, 16)  # of each expert; a tile of the interpreter has 16
HIDDEN, INNER = 20, 35
LAYOUTS = [("w_in",), ("w_out",), ("w_in", "w_out")]
BOTH = LAYOUTS[-1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAN = float("nan")


def turned(tensor: Tensor) -> Tensor:
    """The same matrices, each column by column in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def with_turned(tensors: cases.Tensors, names: tuple[str, ...]) -> cases.Tensors:
    return tensors | {name: turned(tensors[name]) for name in names}


def make_tensors(plan: mk.RoutingPlan, *sizes: object, **options: object) -> cases.Tensors:
    """Inputs; numbers of fp64 where asked for."""
    *sizes, dtype = sizes
    tensors = cases.make_tensors(plan, *sizes, torch.float32, **options)
    gates = tensors["routing_weights"]
    wide = gates.double() if dtype == torch.float64 else gates
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | {"routing_weights": wide}


def check(
    plan: mk.RoutingPlan,
    tensors: cases.Tensors,
    activation: str,
    turn: tuple[str, ...],
    backend: str,
) -> cases.Tensors:
    """Results are as accurate as PyTorch's, and gradients lie as their weights do."""
    upstream = torch.randn(tensors["x"].shape).to(tensors["x"].dtype)
    found = cases.results(plan, with_turned(tensors, turn), upstream, activation, backend)
    cases.assert_accurate(found, plan, tensors, upstream, activation)
    if backend != "reference":
        for name in BOTH:
            assert is_transposed(found[name]) == (name in turn), name
            assert found[name].is_contiguous() == (name not in turn), name
    return found


@pytest.fixture
def serving(backend: str) -> str:
    """The name of the backend that computes; that of CUDA has no products."""
    return "reference" if backend == "cuda" else backend


@pytest.mark.parametrize("turn", LAYOUTS, ids="+".join)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_each_layout_and_activation_is_as_accurate_as_plain_pytorch(activation, turn, serving):
    for plan, bias in ((cases.ragged_plan(ROWS), True), (cases.equal_plan(26, 3), False)):
        tensors = make_tensors(plan, HIDDEN, INNER, activation, torch.float32, bias=bias)
        check(plan, tensors, activation, turn, serving)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_dtype_is_as_accurate_as_plain_pytorch(dtype, serving):
    # The kernels of Triton have no fp64: the reference serves it.
    by = "reference" if dtype == torch.float64 and serving == "triton" else serving
    for plan in (cases.ragged_plan(ROWS), cases.equal_plan(26, 3)):
        tensors = make_tensors(plan, HIDDEN, INNER, "swiglu", dtype, terms=cases.TERMS)
        found = check(plan, tensors, "swiglu", BOTH, by)
        for name in cases.WEIGHTS if plan.rows_per_expert is None else ():  # one has no rows
            assert torch.equal(found[name][0], torch.zeros_like(found[name][0])), name


@pytest.mark.parametrize("turn", LAYOUTS, ids="+".join)
@pytest.mark.parametrize(("hidden", "inner"), [(9, 33), (33, 9), (1, 7), (7, 1)])
def test_odd_widths_are_as_accurate_as_plain_pytorch(hidden, inner, turn, serving):
    plan = cases.ragged_plan((2, 0, 5))
    tensors = make_tensors(plan, hidden, inner, "swiglu", torch.float32)
    upstream = torch.randn(7, hidden)
    found = cases.results(plan, with_turned(tensors, turn), upstream, "swiglu", serving)
    cases.assert_accurate(found, plan, tensors, upstream, "swiglu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("equal", [False, True])
def test_grouped_gemm_is_as_accurate_as_plain_pytorch(equal, dtype, serving):
    plan = cases.equal_plan(34, 3) if equal else cases.ragged_plan((0, 17, 18))
    rows, w = torch.randn(plan.num_rows, 18).to(dtype), torch.randn(3, 35, 18).to(dtype)
    upstream, found = torch.randn(plan.num_rows, 35).to(dtype), []
    runs = ((serving, dtype, turned(w)), ("reference", dtype, w), ("reference", torch.float64, w))
    for name, to, matrix in runs:
        leaves = [t.to(to).clone().requires_grad_() for t in (rows, matrix)]
        out = mk.grouped_gemm(
            *leaves, plan.expert_offsets, rows_per_expert=plan.rows_per_expert, backend=name
        )
        found.append([out, *torch.autograd.grad(out, leaves, upstream.to(to))])
    for actual, plain, exact in zip(*found, strict=True):
        assert_as_accurate(actual, plain, exact)
    assert serving == "reference" or is_transposed(found[0][2])


def test_two_runs_are_equal_bit_for_bit(serving):
    plan = cases.ragged_plan(ROWS)
    tensors = with_turned(make_tensors(plan, HIDDEN, INNER, "swiglu", torch.float32), BOTH)
    upstream = torch.randn(tensors["x"].shape)
    first, second = (cases.results(plan, tensors, upstream, "swiglu", serving) for _ in range(2))
    cases.assert_same_bits(first, second)


def test_what_is_a_transposed_view():
    w = torch.randn(3, 4, 5)
    for view in (turned(w), turned(w)[1:], turned(w)[:1], turned(w).detach().clone()):
        assert is_transposed(view)
    single = torch.randn(3, 4, 1)
    others = [w, w[0], w.transpose(0, 1), turned(w)[:, 1:], turned(w)[:, :, ::2], turned(w)[::2]]
    for other in (*others, single, single.transpose(1, 2), w[:, :1].expand(3, 4, 5)):
        assert not is_transposed(other)


def test_other_strides_give_the_results_of_contiguous_weights(serving):
    plan = cases.ragged_plan((3, 0, 8))
    tensors = make_tensors(plan, 9, 11, "swiglu", torch.float32)
    wide = {name: torch.full((*tensors[name].shape, 2), NAN) for name in BOTH}
    for name, buffer in wide.items():
        buffer[..., 1] = tensors[name]
    upstream = torch.randn(11, 9)

    def run(weights: dict[str, Tensor]) -> cases.Tensors:
        inputs = tensors | weights
        return cases.results(plan, inputs, upstream, "swiglu", serving, make=lambda t: t.detach())

    plain = run({name: tensors[name] for name in BOTH})
    found = run({name: buffer[..., 1] for name, buffer in wide.items()})
    if serving == "reference":  # PyTorch multiplies, and may go another way for other strides
        cases.assert_accurate(found, plan, tensors, upstream, "swiglu")
    else:
        cases.assert_same_bits(found, plain)


class Experts(torch.nn.Module):
    """Weights as transposed parameters, as some models keep them."""

    def __init__(self, hidden: int, inner: int, plan: mk.RoutingPlan) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(plan.num_experts, hidden, 2 * inner))
        self.down_proj = torch.nn.Parameter(torch.randn(plan.num_experts, inner, hidden))
        self.plan = plan

    def forward(self, x: Tensor) -> Tensor:
        w_in, w_out = self.gate_up_proj.transpose(1, 2), self.down_proj.transpose(1, 2)
        return mk.expert_mlp(x, self.plan, w_in, w_out, activation="swiglu")


def gradients(call: Callable[[Tensor], Tensor], module: Experts, x: Tensor) -> list[Tensor]:
    """Output and gradients of the module's weights and of x."""
    x = x.detach().requires_grad_()
    out = call(x)
    module.zero_grad()
    torch.manual_seed(0)
    out.backward(torch.randn(out.shape).to(out.dtype))
    found = [module.gate_up_proj.grad, module.down_proj.grad, x.grad]
    assert all(gradient is not None and gradient.is_contiguous() for gradient in found)
    return [out.detach(), *found]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_in_one_graph_it_gives_the_same(compiler, serving):
    if compiler == "inductor" and serving != "cpu":
        pytest.skip("one backend shows what the compiler does with the strides")
    plan = cases.ragged_plan((3, 0, 8))
    module, x = Experts(12, 9, plan), torch.randn(11, 12)
    expected = gradients(module, module, x)
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    for found, plain in zip(gradients(compiled, module, x), expected, strict=True):
        assert relative_error(found, plain) < 2e-6


def test_autocast_keeps_the_layout(serving):
    plan = cases.ragged_plan((3, 0, 8))
    module, x = Experts(12, 9, plan), torch.randn(11, 12)
    exact = gradients(module, module, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(module, module, x)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert 1e-5 < relative_error(a, b) < 5e-2  # bf16 was used, and nothing worse happened


def samples(dtype: torch.dtype) -> Iterator[tuple[str, tuple[object, ...]]]:
    plan = cases.ragged_plan((2, 4))
    for turn in LAYOUTS:
        tensors = with_turned(make_tensors(plan, 5, 3, "swiglu", dtype), turn)
        operands = [tensors[name] for name in ("x", "routing_weights", *cases.WEIGHTS)]
        indices = (plan.token_indices, plan.row_indices, plan.row_offsets, plan.expert_offsets)
        leaves = [t.clone().requires_grad_() for t in operands]
        yield "expert_mlp", (*leaves, None, None, *indices, 0, "swiglu")
        h, dout = torch.randn(6, 6).to(dtype), torch.randn(6, 5).to(dtype)
        for wanted in ([True] * 6, [False, True, True, False, True, False]):
            yield "expert_mlp_bwd", (dout, h, wanted, *operands, *indices, 0, "swiglu")
    rows, w = tensors["x"], tensors["w_in"]
    leaves = [t.clone().requires_grad_() for t in (rows, w)]
    yield "grouped_gemm", (*leaves, plan.expert_offsets, 0)
    yield "grouped_gemm_bwd", (h, [True, True], rows, w, plan.expert_offsets, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, serving):
    if serving == "reference":
        pytest.skip("the reference's expert_mlp is no op")
    for name, args in samples(dtype):
        opcheck(getattr(getattr(torch.ops.moe_kernels, name), serving), args)


def copies_of(sizes: set[int], call: Callable[[], object]) -> list[str]:
    """PyTorch's operations of ``call`` that fill a tensor of one of these numbers of elements."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                record_shapes=True) as profile:  # fmt: skip
        call()
    filling = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::cat")
    return [
        event.name
        for event in profile.events()
        if event.name in filling
        and any(torch.Size(shape).numel() in sizes for shape in event.input_shapes if shape)
    ]


@pytest.mark.parametrize("what", ["expert_mlp", "grouped_gemm"])
def test_no_weight_or_gradient_is_copied(what, serving):
    if serving == "reference":
        pytest.skip("the reference may copy")
    plan = cases.ragged_plan((3, 4))
    module, x = Experts(12, 9, plan), torch.randn(7, 12)

    def product(x: Tensor) -> Tensor:
        w = module.gate_up_proj.transpose(1, 2)
        return mk.grouped_gemm(x, w, plan.expert_offsets)

    def run() -> None:
        module.zero_grad()
        out = (module if what == "expert_mlp" else product)(x)
        out.backward(torch.ones_like(out))

    run()  # whatever happens once
    weights = {module.gate_up_proj.numel(), module.down_proj.numel()}
    assert copies_of(weights, run) == []
    assert module.gate_up_proj.grad is not None
    # The same question finds the copies of other strides.
    module.gate_up_proj = torch.nn.Parameter(torch.randn(2, 2, 12, 18)[:, 0])
    assert "aten::copy_" in copies_of(weights, run)


WHY_NOT_CPU = BACKENDS["cpu"].why_not("expert_mlp", "cpu")
cpu_only = pytest.mark.skipif(WHY_NOT_CPU is not None, reason=f"the cpu backend {WHY_NOT_CPU}")


@cpu_only
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("turn", LAYOUTS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_by_torch_functions_are_as_accurate(dtype, turn, backend, monkeypatch):
    experts = importlib.import_module("moe_kernels.backends.cpu.experts")
    products = importlib.import_module("moe_kernels.backends.cpu.products")
    monkeypatch.setattr(experts, "PRODUCTS", products.Products(reason="test"))
    plan = cases.ragged_plan(ROWS)
    check(plan, make_tensors(plan, HIDDEN, INNER, "swiglu", dtype), "swiglu", turn, "cpu")


@cpu_only
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("turn", [(), BOTH], ids="+".join)
@pytest.mark.parametrize(("hidden", "inner"), [(21, 530), (530, 21)])
def test_long_and_narrow_weights_give_the_same_bits_on_any_number_of_threads(
    hidden, inner, turn, dtype, backend
):
    plan = cases.ragged_plan((70, 0, 3, 130))  # pieces of 64 rows, and of 512 rows of dw
    tensors = make_tensors(plan, hidden, inner, "swiglu", dtype)
    check(plan, tensors, "swiglu", turn, backend)
    case = (plan, with_turned(tensors, turn), torch.randn_like(tensors["x"]), "swiglu", backend)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cases.results(*case))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        cases.assert_same_bits(other, found[0])
