"""Errors of the vector math on the CPU, on every instruction set of this build."""

import importlib
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moe_kernels as mk
from moe_kernels.backends import BACKENDS
from moe_kernels.ops import rows as ops
from moe_kernels.testing import make_logits

if (reason := BACKENDS["cpu"].why_not("expert_mlp", "cpu")) is not None:
    pytest.skip(f"the cpu backend {reason}", allow_module_level=True)
native = importlib.import_module("moe_kernels._cpu")
DTYPES = importlib.import_module("moe_kernels.backends.cpu.native").DTYPES
KINDS = {"gelu_tanh": 0, "gelu": 1, "swiglu": 2}
WIDE = (torch.float32, torch.float64)
LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, params=native.isas())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The cpu backend on one instruction set."""
    before = native.isa()
    native.use_isa(request.param)
    with mk.use_backend("cpu"):
        yield "cpu"
    native.use_isa(before)


def grid(dtype: torch.dtype) -> Tensor:
    """Points close together where the functions bend, single ones far out; both signs."""
    seams = torch.tensor([1.0, math.sqrt(2), 6.0, 40.0], dtype=torch.float64)
    steps = torch.arange(-32, 33, dtype=torch.float64) * torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).tiny
    points = torch.cat(
        [
            torch.linspace(0, 8, 20001, dtype=torch.float64),
            torch.linspace(8, 60, 4001, dtype=torch.float64),
            torch.logspace(-30, 4, 2001, dtype=torch.float64),
            (seams[:, None] * (1 + steps)).flatten(),
            torch.tensor([1e4, 1e10, 1e20, 1e30, tiny, tiny / 2, tiny / 1000, 0.0]).double(),
        ]
    )
    return torch.cat([points, -points]).to(dtype)


def call(activation: str, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative at ``gate``, one row; the other half of swiglu is 1."""
    size = gate.shape[0]
    h = torch.cat([gate, torch.ones_like(gate)]) if activation == "swiglu" else gate
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    a, again = torch.full_like(gate, math.nan), torch.full_like(gate, math.nan)
    dh, da = torch.full_like(h, math.nan), torch.ones_like(gate)
    kind = (DTYPES[gate.dtype], KINDS[activation])
    native.activation_fwd(
        *kind, h.data_ptr(), 0, 0, offsets.data_ptr(), a.data_ptr(), 1, 1, size, 1
    )
    pointers = [again.data_ptr(), da.data_ptr(), dh.data_ptr(), 0]
    native.activation_bwd(*kind, h.data_ptr(), 0, 0, offsets.data_ptr(), *pointers, 1, 1, size, 1)
    assert torch.equal(a, again)
    if activation == "swiglu":
        assert torch.equal(dh[size:], a)  # the derivative with respect to the factor 1
    return a, dh[:size]


def exact(activation: str, points: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative in fp64, without cancellation in the tails."""
    h = points.double()
    if activation == "gelu":
        phi = 0.5 * torch.special.erfc(-h * math.sqrt(0.5))
        return h * phi, phi + h * torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
    if activation == "swiglu":
        s, rest = torch.sigmoid(h), torch.sigmoid(-h)
        return h * s, s * (1 + h * rest)
    root = 2 * math.sqrt(2 / math.pi)
    u = root * (h + 0.044715 * h**3)
    s, rest = torch.sigmoid(u), torch.sigmoid(-u)
    flat = s * rest
    slope = torch.where(flat > 0, h * flat * root * (1 + 3 * 0.044715 * h * h), 0.0)
    return h * s, s + slope


def plain_derivative(activation: str, points: Tensor) -> Tensor:
    """PyTorch's, in the precision of the points."""
    leaf = points.clone().requires_grad_()
    out = F.silu(leaf)
    if activation != "swiglu":
        out = F.gelu(leaf, approximate="tanh" if activation == "gelu_tanh" else "none")
    return torch.autograd.grad(out, leaf, torch.ones_like(out))[0]


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_activations_err_by_a_few_units_in_the_last_place(activation, dtype):
    """The scale of a value is |h|; that of a derivative is 1.

    Where 1 - sigmoid is rounded and then multiplied by a large h the derivative errs by more, in
    PyTorch too.
    """
    points = grid(dtype)
    value, derivative = call(activation, points)
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(derivative).all())
    want_value, want_derivative = exact(activation, points)
    eps = torch.finfo(dtype).eps
    plain = plain_derivative(activation, points).double()
    usable = plain.isfinite()
    plain_error = (plain - want_derivative)[usable].abs().max()
    error = (derivative.double() - want_derivative).abs().max()
    assert float(error) < max(4 * eps, 2 * float(plain_error))
    # A denormal result is rounded to a multiple of the smallest number.
    smallest = torch.finfo(dtype).tiny * eps
    units = (value.double() - want_value).abs() / (points.double().abs() * eps + smallest)
    assert float(units.max()) < 2


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_tails_keep_their_relative_accuracy(dtype):
    """Far left e^-x² is small but not lost; rounding x² costs x² units in the last place."""
    end = 12.0 if dtype == torch.float32 else 36.0
    points = -torch.linspace(0.5, end, 5001, dtype=torch.float64).to(dtype)
    value, _ = call("gelu", points)
    want, _ = exact("gelu", points)
    units = ((value.double() - want) / want).abs() / torch.finfo(dtype).eps
    # The expected value is as far from the truth, when it is computed in the same precision.
    excess = units / (4 + 2 * points.double().square())
    assert float(excess.max()) < 1


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_activations_are_rounded_once(activation, dtype):
    """The fp32 result, rounded to nearest."""
    points = grid(torch.float32).clamp(-6e4, 6e4).to(dtype)
    value, derivative = call(activation, points)
    wide_value, wide_derivative = call(activation, points.float())
    assert torch.equal(value, wide_value.to(dtype))
    assert torch.equal(derivative, wide_derivative.to(dtype))


def probabilities(logits: Tensor, affinity: str) -> Tensor:
    return torch.ops.moe_kernels.affinity.cpu(logits, affinity)


@pytest.mark.parametrize("kind", ["normal", "equal", "collapsed", "extreme"])
@pytest.mark.parametrize("experts", [1, 3, 17, 64, 130])
def test_softmax_sums_to_one(kind, experts):
    for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 4e-15)):
        logits = make_logits(100, experts, kind, dtype=dtype)
        probs = probabilities(logits, "softmax")
        assert float((probs.double().sum(-1) - 1).abs().max()) < bound
        assert bool((probs >= 0).all())
        want = torch.softmax(logits.double(), -1)
        # exp of a difference d that was rounded errs by |d| units, a sum of E by E / 2.
        distance = (logits.amax(-1, keepdim=True) - logits).double()
        units = (probs.double() - want).abs() / (want * torch.finfo(dtype).eps + 1e-44)
        assert bool((units < 4 + distance + experts / 2).all())


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_far_behind_probabilities_are_exact_zeros(dtype):
    logits = torch.tensor([[0.0, -800.0, -1e30], [1e30, 0.0, -1e30], [-5.0, -5.0, -900.0]])
    want = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]
    assert probabilities(logits.to(dtype), "softmax").tolist() == want
    extremes = torch.tensor([[0.0, 800.0, -800.0, math.inf, -math.inf]], dtype=dtype)
    assert probabilities(extremes, "sigmoid").tolist() == [[0.5, 1.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_sigmoid_and_logsumexp(dtype):
    logits = grid(dtype).clamp(-80, 80).view(-1, 2)
    want = torch.sigmoid(logits.double())
    units = (probabilities(logits, "sigmoid").double() - want).abs() / torch.finfo(dtype).eps
    assert bool((units < 3 * want).all())
    for row in logits[::400]:
        plan = mk.token_choice(row.view(1, -1), 1)
        logsumexp = float(torch.logsumexp(row.double(), -1))
        allowed = 4 * torch.finfo(dtype).eps * (float(row.abs().max()) + 1)
        error = abs(float(mk.router_z_loss(plan)) - logsumexp**2)
        assert error <= 2 * abs(logsumexp) * allowed + allowed**2


def every_pattern(dtype: torch.dtype) -> Tensor:
    """All finite 16-bit numbers, 64 a row."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return bits[torch.isfinite(bits)].view(-1, 64)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_conversions_keep_every_finite_number(dtype):
    x = every_pattern(dtype)
    rows = torch.arange(x.shape[0], dtype=torch.int32)
    offsets = torch.arange(x.shape[0] + 1, dtype=torch.int32)
    ones = torch.ones(x.shape[0])
    copied, _ = ops.gather["cpu"](x, rows, ones, None)
    assert torch.equal(copied.view(torch.int16), x.view(torch.int16))
    unsigned_zero = torch.where(x == 0, torch.zeros_like(x), x)  # a sum starts from +0
    for weights in (ones, None):
        summed = ops.sum_rows["cpu"](x, weights, rows, offsets)
        assert torch.equal(summed.view(torch.int16), unsigned_zero.view(torch.int16))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("weight", [1.00390625, 0.7, 0.5, 3e-5, 1.5, 300.0])
def test_rounding_is_to_nearest_even_with_overflow_to_infinity(dtype, weight):
    x = every_pattern(dtype)
    rows = torch.arange(x.shape[0], dtype=torch.int32)
    scaled, _ = ops.gather["cpu"](x, rows, torch.full((x.shape[0],), weight), None)
    want = (x.float() * torch.tensor(weight)).to(dtype)
    assert torch.equal(scaled.view(torch.int16), want.view(torch.int16))
