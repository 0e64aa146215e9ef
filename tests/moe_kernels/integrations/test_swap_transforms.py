"""Swapped blocks under what PyTorch does with functions: traces, transforms, retained graphs."""

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import moe_kernels as mk
from moe_kernels.backends import serving
from moe_kernels.integrations.swapped import Swapped
from moe_kernels.testing import ERROR_FLOOR, relative_error

hidream = pytest.importorskip("diffusers.models.transformers.transformer_hidream_image")
nucleus = pytest.importorskip("diffusers.models.transformers.transformer_nucleusmoe_image")


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    """What the automatic choice takes: these are questions to the ops, which all backends share."""
    with mk.use_backend("auto"):
        yield serving("expert_mlp", torch.device("cpu"))


def make_block() -> nn.Module:
    return hidream.MOEFeedForwardSwiGLU(32, 64, num_routed_experts=4, num_activated_experts=2)


@pytest.fixture
def block() -> nn.Module:
    made = make_block()
    mk.apply(made)
    return made


def test_a_retained_graph_gives_the_same_gradients_again(block):
    loss = block(torch.randn(2, 16, 32)).square().sum()
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in block.named_parameters()}
    loss.backward()
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter.grad, 2 * once[name]), name


@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_is_refused_instead_of_losing_tangents(block, frozen, backend):
    if backend == "reference":
        pytest.skip("the reference is made of PyTorch's operations, which have their own rules")
    block.requires_grad_(not frozen)
    x = torch.randn(2, 16, 32)
    with pytest.raises(RuntimeError, match="forward-mode differentiation"):
        torch.func.jvp(block, (x,), (x,))
    with (
        pytest.raises(RuntimeError, match="forward-mode differentiation"),
        forward_ad.dual_level(),
    ):
        block(forward_ad.make_dual(x, x))


def test_function_transforms_say_what_does_not_work(block, backend):
    if backend == "reference":
        pytest.skip("the reference is made of PyTorch's operations")

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(block, parameters, (torch.randn(1, 8, 32),)).sum()

    with pytest.raises(RuntimeError, match=r"revert\(\) a swapped model"):
        torch.func.grad(loss)(dict(block.named_parameters()))


def test_functional_call_computes_with_the_parameters_given(block):
    x, other = torch.randn(2, 16, 32), make_block()
    given = {name: p.detach() for name, p in other.named_parameters()}
    expected = other(x)
    actual = torch.func.functional_call(block, given, (x,))
    assert relative_error(actual, expected) < 4 * ERROR_FLOOR[torch.float32]


def test_a_trace_of_a_frozen_block_computes_for_other_inputs(block):
    block.requires_grad_(False).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(block, (torch.randn(2, 16, 32),))
    x = torch.randn(2, 16, 32)
    assert relative_error(traced(x), block(x)) < 4 * ERROR_FLOOR[torch.float32]


def test_apply_in_inference_mode_leaves_ordinary_parameters():
    block = make_block()
    with torch.inference_mode():
        mk.apply(block)
    assert isinstance(block, Swapped)
    assert not any(p.is_inference() for p in block.parameters())
    block(torch.randn(1, 8, 32)).square().sum().backward()
    with torch.inference_mode():
        mk.revert(block)
    block.train()(torch.randn(1, 8, 32)).square().sum().backward()


def test_weights_in_somebody_elses_buffer_stay_there():
    block = make_block()
    flat = torch.cat([p.detach().flatten() for p in block.parameters()])
    at = 0
    for parameter in block.parameters():
        parameter.data = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    report = mk.apply(block)
    assert "larger buffer of somebody else" in report.rows[0].detail
    x = torch.randn(2, 8, 32)
    before = block(x)
    flat.mul_(0.5)  # as an optimiser does that owns the buffer
    assert not torch.allclose(block(x), before)
    mk.revert(block)
    start, end = flat.data_ptr(), flat.data_ptr() + flat.nbytes
    assert all(start <= p.data_ptr() < end for p in block.parameters())


@pytest.mark.parametrize("logit", [0.0, -26.0, -30.0, -34.0, -110.0])
def test_sigmoid_affinities_next_to_nothing_are_divided_as_in_the_original(logit):
    block = nucleus.NucleusMoELayer(32, 48, 4, 2.0, use_sigmoid=True, route_scale=2.5)
    for weight in (block.experts.gate_up_proj, block.experts.down_proj):
        nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        block.gate.weight.mul_(0.1)
        block.gate.weight[:, 0] = logit
    timestep = torch.randn(2, 32)
    timestep[:, 0] = 1.0
    inputs = (torch.randn(2, 16, 32), torch.randn(2, 16, 32), timestep)
    exact = copy.deepcopy(block).double()(*(tensor.double() for tensor in inputs))
    plain = block(*inputs)
    mk.apply(block)
    allowed = max(2 * relative_error(plain, exact), ERROR_FLOOR[torch.float32])
    assert relative_error(block(*inputs), exact) <= allowed


def test_a_failed_verification_gives_blocks_their_former_backend(monkeypatch):
    model = nn.ModuleList([make_block(), make_block()])
    mk.apply(model[0], backend="reference")
    monkeypatch.setattr(
        type(model[0]).adapter, "forward", lambda module, x: module.shared_experts(x)
    )
    with pytest.raises(mk.VerificationFailed):
        mk.apply(model, verify=True)
    assert not isinstance(model[1], Swapped)
    assert model[0].__dict__["_moe_kernels_backend"] == "reference"


def test_an_exclude_pattern_that_fits_nothing_is_an_error_before_anything_is_done():
    model = nn.ModuleList([make_block()])
    with pytest.raises(ValueError, match="fits no module"):
        mk.apply(model, exclude="blocks.*")
    assert not isinstance(model[0], Swapped)


def test_paths_of_a_compiled_model_are_those_of_the_model():
    compiled = torch.compile(nn.Sequential(make_block()))
    assert mk.apply(compiled, include="0").swapped == ["0"]


def test_a_backend_that_cannot_serve_here_is_told():
    report = mk.apply(make_block(), backend="cuda")
    if not torch.cuda.is_available():
        assert "as long as it is on cpu its forward raises" in report.rows[0].detail
