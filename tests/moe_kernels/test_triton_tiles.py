"""Every way that the products of the Triton backend are cut: tiles, persistent, descriptors.

In the interpreter: small tiles, so that a GPU's cases (tails, tiles that run into the next expert,
programs with several tiles, epilogues by parts of a tile) all come up on small tensors.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import moe_kernels as mk
from moe_kernels.backends import BACKENDS

from . import expert_cases as cases

if (reason := BACKENDS["triton"].why_not("expert_mlp", "cpu")) is not None:
    pytest.skip(f"the triton backend {reason}", allow_module_level=True)

from moe_kernels.backends.triton import configs, gemm_launch
from moe_kernels.backends.triton.config_table import Config
from moe_kernels.backends.triton.launch import Target, recorded

DESCRIPTORS = Target("interpreter", processors=2, descriptors=True)
PERSISTENT = Config(16, 32, 16, 4, 1, group_m=2, persistent=True)
ROWS = (5, 18, 0, 3)  # the last tile of an expert runs into rows of the next
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    with mk.use_backend("triton"):
        yield "triton"


@pytest.fixture
def with_descriptors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gemm_launch, "target_of", lambda tensor: DESCRIPTORS)
    with configs.forced(PERSISTENT):
        yield


def descriptors_of(call: Callable[[], object]) -> dict[str, tuple[bool, bool]]:
    """Whether the operands (rows, w) of each product of ``call`` are read by descriptors."""
    used = {}
    with recorded(DESCRIPTORS) as launches, configs.forced(PERSISTENT):
        call()
    for launch in launches:
        if "W_DESCRIPTOR" not in launch.constants:
            continue
        kernel, transposed = launch.kernel.__name__, launch.constants.get("TRANSPOSED", True)
        name = kernel.removeprefix("_").removesuffix("_kernel") + ("" if transposed else "_nn")
        chosen = launch.constants.get("A_DESCRIPTOR", False), launch.constants["W_DESCRIPTOR"]
        sources = launch.args.get("a_source"), launch.args["w_source"]
        assert chosen == tuple(type(source).__name__ == "TensorDescriptor" for source in sources)
        used[name] = chosen
    return used


def make_case(hidden: int, inner: int, activation: str, dtype: torch.dtype = torch.float32):
    plan = cases.ragged_plan(ROWS)
    tensors = cases.make_tensors(plan, hidden, inner, activation, dtype, terms=cases.TERMS)
    return plan, tensors, torch.randn(plan.num_tokens, hidden).to(dtype), activation


# Where the summed dimension is not a multiple of 16 and w is not as in nn.Linear (down_bwd over
# HIDDEN, rows_gemm_nn over the rows of w_in), its tile would run into the next expert's matrix.
ALL = {
    "up_fwd": (False, True),
    "rows_gemm": (True, True),
    "down_bwd": (False, True),
    "rows_gemm_nn": (True, True),
}
NONE = dict.fromkeys(ALL, (False, False))
FORWARD = {**NONE, "up_fwd": (False, True), "rows_gemm": (True, True)}
WIDTHS = [
    (32, 64, "gelu", torch.float32, ALL),  # whole tiles everywhere
    (32, 32, "swiglu", torch.bfloat16, ALL),
    (48, 40, "swiglu", torch.float32, ALL),  # ends inside a tile along the columns
    (40, 24, "swiglu", torch.float32, {**ALL, "down_bwd": (False, False)}),  # and along the sum
    (40, 24, "gelu_tanh", torch.float16, FORWARD),
    (20, 36, "gelu", torch.float32, FORWARD),
    (20, 36, "gelu", torch.float16, NONE),  # rows of 40 and 72 bytes: no steps of 16
    (9, 33, "swiglu", torch.float32, NONE),
]


@pytest.mark.parametrize(("hidden", "inner", "activation", "dtype", "expected"), WIDTHS)
def test_descriptors_are_used_where_memory_allows_and_right(
    hidden, inner, activation, dtype, expected, with_descriptors
):
    case = make_case(hidden, inner, activation, dtype)
    assert descriptors_of(lambda: cases.results(*case)) == expected
    cases.assert_accurate(cases.results(*case), *case)


@pytest.mark.parametrize("group", ["ragged", "equal"])
def test_grouped_gemm_by_descriptors_gives_the_bits_of_the_plain_one(group, with_descriptors):
    plan = cases.equal_plan(26, 3) if group == "equal" else cases.ragged_plan(ROWS[1:])
    leaves = [torch.randn(plan.num_rows, 24), torch.randn(3, 40, 24)]
    upstream = torch.randn(plan.num_rows, 40)

    def run() -> list[Tensor]:
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        equal = plan.rows_per_expert
        out = mk.grouped_gemm(*inputs, plan.expert_offsets, rows_per_expert=equal)
        return [out, *torch.autograd.grad(out, inputs, upstream)]

    used = {"rows_gemm": (True, True), "rows_gemm_nn": (False, False)}
    assert descriptors_of(run) == used
    by_descriptors = run()
    with configs.forced(replace(PERSISTENT, persistent=False)):
        for a, b in zip(by_descriptors, run(), strict=True):
            assert torch.equal(a, b)


def test_operands_that_start_between_steps_of_16_bytes_are_read_by_pointers(with_descriptors):
    plan, tensors, upstream, activation = make_case(32, 32, "gelu")

    def shifted(tensor: Tensor) -> Tensor:
        buffer = torch.full((tensor.numel() + 1,), NAN)
        buffer[1:] = tensor.flatten()
        return buffer[1:].view(tensor.shape)

    def run() -> cases.Tensors:
        return cases.results(plan, tensors, upstream, activation, make=shifted)

    by_pointers = {"up_fwd": (False, False), "rows_gemm": (True, False)}  # a and dh are our own
    assert descriptors_of(run) == by_pointers | {
        "down_bwd": (False, False),
        "rows_gemm_nn": (True, False),
    }
    cases.assert_same_bits(run(), cases.results(plan, tensors, upstream, activation))


@pytest.mark.parametrize(
    ("path", "hidden", "inner"),
    [("plain", 20, 24), ("descriptors", 40, 24), ("descriptors", 32, 32)],
)
@pytest.mark.parametrize("what", ["weights", "rows"])
@pytest.mark.parametrize("sick", [0, 1])
def test_an_expert_that_is_no_number_leaves_the_others_alone(
    path, hidden, inner, what, sick, request
):
    if path == "descriptors":
        request.getfixturevalue("with_descriptors")
    plan, tensors, upstream, activation = make_case(hidden, inner, "swiglu")
    clean = cases.results(plan, tensors, upstream, activation)
    tokens = plan.token_indices[plan.expert_of_row == sick].long()
    if what == "weights":
        for name, value in zip(cases.WEIGHTS, (NAN, INF, -INF, NAN), strict=True):
            tensors[name][sick] = value
    else:
        tensors["x"][tokens] = NAN
        upstream[tokens] = INF
    found = cases.results(plan, tensors, upstream, activation)
    assert not bool(torch.isfinite(found["out"][tokens]).any())
    rows = plan.row_indices.long()[tokens]  # each token has one row
    for name, result in found.items():
        places = sick if name in cases.WEIGHTS else rows if name == "routing_weights" else tokens
        healthy = torch.ones(result.shape[0], dtype=torch.bool)
        healthy[places] = False
        assert bool(torch.isfinite(result[healthy]).all()), name
        assert torch.equal(result[healthy], clean[name][healthy]), name


BY_HALVES = Config(32, 128, 32, 4, 1)  # epilogues
BY_QUARTERS = Config(16, 256, 32, 4, 1)  # the forward one; the backward one by halves
CONFIGS = [
    (Config(16, 16, 16, 4, 1, group_m=1), "gelu"),
    (Config(32, 32, 32, 4, 1, group_m=3), "swiglu"),
    (Config(64, 64, 16, 4, 1), "gelu_tanh"),
    (Config(16, 16, 32, 4, 1, persistent=True), "swiglu"),
    *((config, name) for config in (BY_HALVES, BY_QUARTERS) for name in ("gelu", "swiglu")),
]


@pytest.mark.parametrize(("config", "activation"), CONFIGS)
def test_every_config_is_as_accurate_as_plain_pytorch_and_repeats_its_bits(config, activation):
    case = make_case(20, 150 if config.block_n > 64 else 40, activation)
    with configs.forced(config):
        actual = cases.results(*case)
        cases.assert_accurate(actual, *case)
        cases.assert_same_bits(cases.results(*case), actual)


@pytest.mark.parametrize("kind", ["ragged", "equal"])
def test_bits_do_not_depend_on_how_programs_share_the_tiles(kind, monkeypatch):
    plan = cases.equal_plan(26, 3) if kind == "equal" else cases.ragged_plan(ROWS)
    tensors = cases.make_tensors(plan, 20, 18, terms=cases.TERMS)
    case = (plan, tensors, torch.randn(plan.num_tokens, 20), "swiglu")
    small = Config(16, 16, 16, 4, 1, group_m=1)
    with configs.forced(small):
        expected = cases.results(*case)
    for processors, group_m in ((1, 2), (3, 8), (1000, 3)):
        target = Target("interpreter", processors=processors)
        with (
            monkeypatch.context() as patch,
            configs.forced(replace(small, group_m=group_m, persistent=True)),
        ):
            patch.setattr(gemm_launch, "target_of", lambda tensor, target=target: target)
            cases.assert_same_bits(cases.results(*case), expected)
            with recorded(target) as launches:
                cases.results(*case)
        products = [launch for launch in launches if "W_DESCRIPTOR" in launch.constants]
        assert len(products) == 4
        assert all(launch.grid[0] <= processors for launch in products)


def test_h_has_the_same_bits_whatever_the_order_of_the_tiles():
    plan, tensors, _, activation = make_case(20, 24, "swiglu")
    operands = [
        tensors.get(name) for name in ("x", "routing_weights", *cases.WEIGHTS, *cases.TERMS)
    ]
    indices = (plan.token_indices, plan.row_indices, plan.row_offsets, plan.expert_offsets)

    def kept(config: Config) -> Tensor:
        with configs.forced(config):
            return torch.ops.moe_kernels.expert_mlp.triton(*operands, *indices, 0, activation)[1]

    base = Config(16, 16, 16, 4, 1, group_m=1)
    expected = kept(base)
    for group_m, persistent in ((2, False), (8, True)):
        assert torch.equal(kept(replace(base, group_m=group_m, persistent=persistent)), expected)
