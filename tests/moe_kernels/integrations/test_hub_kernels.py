"""Layers of this package under Hugging Face ``kernels``, without the hub."""

import copy
import socket
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.integrations.hub_kernels import LAYERS, kernel_mapping, register_with_kernels

from .blocks import Results, assert_parity
from .parity import backend

kernels = pytest.importorskip("kernels", reason="a bridge to Hugging Face kernels")

__all__ = ["backend"]

HIDDEN, INNER, EXPERTS, TOP_K, TOKENS = 16, 24, 4, 2, 20
MODES = [
    kernels.Mode.TRAINING,
    kernels.Mode.INFERENCE,
    kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE,
    kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE,
]


@kernels.use_kernel_forward_from_hub("MoEKernelsExperts")
class LoopedExperts(nn.Module):
    """The layout of transformers' experts, one expert after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.3)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for e in range(EXPERTS):
            token, choice = torch.where(top_k_index == e)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[e]).chunk(2, dim=-1)
            result = F.linear(F.silu(gate) * up, self.down_proj[e])
            out = out.index_add(0, token, result * top_k_weights[token, choice, None])
        return out


class Model(nn.Module):
    """A router, and the experts somewhere inside."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.inner = nn.ModuleDict({"experts": LoopedExperts()})

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(TOP_K)
        return x + self.inner["experts"](x, index, weights)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks the hub fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def registered() -> Iterator[None]:
    """What is registered in the test is forgotten after it."""
    with kernels.use_kernel_mapping({}):
        register_with_kernels()
        yield


def run(model: nn.Module, x: Tensor, upstream: Tensor | None) -> Results:
    x = x.clone().requires_grad_(upstream is not None)
    with torch.set_grad_enabled(upstream is not None):
        out = model(x)
        out = out[0] if isinstance(out, tuple) else out
    if upstream is None:
        return {"out": out}
    leaves = [x, *model.parameters()]
    gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return {"out": out.detach()} | {f"gradient {i}": g for i, g in enumerate(gradients)}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernelized_experts(registered, mode, dtype):
    model = Model().to(dtype)
    original, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    kernelized = kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    assert kernelized.inner["experts"].forward.__func__ is LAYERS["MoEKernelsExperts"].forward
    training = kernels.Mode.TRAINING in mode
    x = torch.randn(TOKENS, HIDDEN).to(dtype)
    upstream = torch.randn(TOKENS, HIDDEN) if training else None
    called = kernelized
    if kernels.Mode.TORCH_COMPILE in mode:
        called = torch.compile(kernelized, fullgraph=True, backend="aot_eager")
    actual = run(called, x, upstream)
    assert_parity(actual, run(original, x, upstream), run(exact, x.double(), upstream))


def test_a_mapping_holds_inside_the_with():
    model = Model()
    with kernels.use_kernel_mapping(kernel_mapping(["MoEKernelsExperts"]), inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    ours = LAYERS["MoEKernelsExperts"].forward
    assert model.inner["experts"].forward.__func__ is ours
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    assert model.inner["experts"].forward.__func__ is LoopedExperts.forward


@pytest.mark.parametrize("mode", [kernels.Mode.TRAINING, kernels.Mode.INFERENCE], ids=str)
def test_gpt_oss_of_transformers(registered, mode):
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = gpt_oss.GptOssConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    config._experts_implementation = "eager"

    class Marked(gpt_oss.GptOssMLP):
        """As in transformers, which marks it only for some versions of kernels."""

    kernels.replace_kernel_forward_from_hub(Marked, "MegaBlocksMoeMLP")
    model = Marked(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    original, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    assert model.forward.__func__ is LAYERS["MegaBlocksMoeMLP"].forward
    x, upstream = torch.randn(2, TOKENS, HIDDEN), torch.randn(2, TOKENS, HIDDEN)
    actual = run(model, x, upstream)
    assert_parity(actual, run(original, x, upstream), run(exact, x.double(), upstream))
    assert torch.equal(model(x)[1], original(x)[1])


def test_a_registration_replaces_the_one_before(registered):
    hub = kernels.LayerRepository("nobody/nothing", layer_name="Experts", version=1)
    kernels.register_kernel_mapping({"MoEKernelsExperts": {"cpu": hub}})
    register_with_kernels(["MoEKernelsExperts"], ["cpu"])
    model = kernels.kernelize(Model(), mode=kernels.Mode.TRAINING, device="cpu")
    assert model.inner["experts"].forward.__func__ is LAYERS["MoEKernelsExperts"].forward


def test_only_the_devices_asked_for():
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        register_with_kernels(devices=["cuda"])
        with pytest.raises(ValueError, match="with device type"):
            kernels.kernelize(Model(), mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"'Experts'; expected one of MoEKernelsExperts, Mega"):
        kernel_mapping(["Experts"])
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match="pip install kernels"):
        register_with_kernels()
