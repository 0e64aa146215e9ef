"""Transposed expert weights in the tiles of the Triton backend, by pointers and descriptors."""

from collections.abc import Iterator

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
from moe_kernels.backends.triton.launch import Launch, Target, recorded

DESCRIPTORS = Target("interpreter", processors=2, descriptors=True)
PERSISTENT = Config(16, 32, 16, 4, 1, group_m=2, persistent=True)
ROWS = (5, 18, 0, 3)  # the last tile of an expert runs into rows of the next
NAN, INF = float("nan"), float("inf")
MATRICES = ("w_in", "w_out")

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


def make_case(hidden: int, inner: int, activation: str, dtype: torch.dtype = torch.float32):
    plan = cases.ragged_plan(ROWS)
    tensors = cases.make_tensors(plan, hidden, inner, activation, dtype)
    for name in MATRICES:
        tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    return plan, tensors, torch.randn(plan.num_tokens, hidden).to(dtype), activation


def products_of(*case: object, make=lambda t: t.detach()) -> dict[str, Launch]:
    """The launches that read weights, forward and backward, by their names."""
    with recorded(DESCRIPTORS) as launches, configs.forced(PERSISTENT):
        cases.results(*case, make=make)
    found = {}
    for launch in launches:
        if "W_DESCRIPTOR" in launch.constants:
            name = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
            found[name + ("" if launch.constants.get("TRANSPOSED", True) else "_nn")] = launch
    return found


# Whether the operands (rows, w) are read by descriptors. Where the summed dimension is not a
# multiple of 16 and its numbers are not neighbours in memory (up_fwd over HIDDEN, rows_gemm_nn over
# INNER), a tile would run into the next expert's matrix.
ALL = {
    "up_fwd": (False, True),
    "rows_gemm_nn": (True, True),
    "down_bwd": (False, True),
    "rows_gemm": (True, True),
}
NONE = dict.fromkeys(ALL, (False, False))
BACKWARD = {**NONE, "down_bwd": (False, True), "rows_gemm": (True, True)}
WIDTHS = [
    (32, 64, "gelu", torch.float32, ALL),  # whole tiles everywhere
    (32, 32, "swiglu", torch.bfloat16, ALL),
    (48, 40, "swiglu", torch.float32, {**ALL, "rows_gemm_nn": (False, False)}),
    (40, 48, "swiglu", torch.float32, {**ALL, "up_fwd": (False, False)}),
    (40, 24, "gelu_tanh", torch.float16, BACKWARD),
    (20, 36, "swiglu", torch.float32, BACKWARD),
    (20, 36, "gelu", torch.float16, NONE),  # rows of 40 and 72 bytes: no steps of 16
    (9, 33, "swiglu", torch.float32, NONE),
]


@pytest.mark.parametrize(("hidden", "inner", "activation", "dtype", "expected"), WIDTHS)
def test_descriptors_are_used_where_memory_allows_and_right(
    hidden, inner, activation, dtype, expected, with_descriptors
):
    case = make_case(hidden, inner, activation, dtype)
    used = {
        name: (launch.constants.get("A_DESCRIPTOR", False), launch.constants["W_DESCRIPTOR"])
        for name, launch in products_of(*case).items()
    }
    assert used == expected
    cases.assert_accurate(cases.results(*case), *case)


@pytest.mark.parametrize(("hidden", "inner"), [(32, 32), (9, 33)])
def test_kernels_read_the_weights_where_they_lie(hidden, inner):
    case = make_case(hidden, inner, "swiglu")
    tensors = case[1]
    addresses = {name: tensors[name].data_ptr() for name in MATRICES}
    read = {}
    for name, launch in products_of(*case).items():
        source = launch.args["w_source"]
        tensor = source.base if launch.constants["W_DESCRIPTOR"] else source
        read[name] = tensor.data_ptr()
    assert read == {
        "up_fwd": addresses["w_in"],
        "rows_gemm_nn": addresses["w_out"],
        "down_bwd": addresses["w_out"],
        "rows_gemm": addresses["w_in"],
    }


@pytest.mark.parametrize(
    ("path", "hidden", "inner"),
    [("plain", 20, 24), ("plain", 32, 64), ("descriptors", 40, 24), ("descriptors", 48, 40)],
)
@pytest.mark.parametrize("sick", [0, 1])
def test_an_expert_that_is_no_number_leaves_the_others_alone(path, hidden, inner, sick, request):
    if path == "descriptors":
        request.getfixturevalue("with_descriptors")
    plan, tensors, upstream, activation = make_case(hidden, inner, "swiglu")
    clean = cases.results(plan, tensors, upstream, activation)
    tokens = plan.token_indices[plan.expert_of_row == sick].long()
    for name, value in zip(MATRICES, (NAN, INF), strict=True):
        tensors[name][sick] = value
    found = cases.results(plan, tensors, upstream, activation)
    assert not bool(torch.isfinite(found["out"][tokens]).any())
    rows = plan.row_indices.long()[tokens]  # each token has one row
    for name, result in found.items():
        places = sick if name in cases.WEIGHTS else rows if name == "routing_weights" else tokens
        healthy = torch.ones(result.shape[0], dtype=torch.bool)
        healthy[places] = False
        assert torch.equal(result[healthy], clean[name][healthy]), name


def test_operands_that_start_between_steps_of_16_bytes_are_read_by_pointers(with_descriptors):
    plan, tensors, upstream, activation = make_case(32, 32, "gelu")

    def shifted(tensor: Tensor) -> Tensor:
        buffer = torch.full((tensor.numel() + 1,), NAN)[1:]
        return buffer.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    used = products_of(plan, tensors, upstream, activation, make=shifted)
    by_descriptor = {name: launch.constants["W_DESCRIPTOR"] for name, launch in used.items()}
    assert by_descriptor == dict.fromkeys(ALL, False)
    found = cases.results(plan, tensors, upstream, activation, make=shifted)
    cases.assert_same_bits(found, cases.results(plan, tensors, upstream, activation))


HALVES = Config(32, 128, 32, 4, 1)  # epilogues by halves of a tile


@pytest.mark.parametrize("config", [HALVES, PERSISTENT, Config(64, 64, 16, 4, 1)])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_every_config_is_as_accurate_as_plain_pytorch(config, activation):
    case = make_case(20, 150 if config is HALVES else 40, activation)
    with configs.forced(config):
        cases.assert_accurate(cases.results(*case), *case)
