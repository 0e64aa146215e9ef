"""Reading the dense MLP blocks of common libraries, by class name and attributes."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.upcycling.activations import activate, recognise

# Attributes of a block: projections in (all of them, gate first), projection out, gated or not.
# timm and DiT, transformers (Llama and its many relatives; Phi-3; Nemotron; Qwen2-VL; GPT-NeoX).
LAYOUTS = (
    (("gate_proj", "up_proj"), "down_proj", True),
    (("gate_up_proj",), "down_proj", True),
    (("up_proj",), "down_proj", False),
    (("fc1",), "fc2", False),
    (("linear_fc1",), "linear_fc2", False),
    (("dense_h_to_4h",), "dense_4h_to_h", False),
)
ACTIVATION_NAMES = ("act", "act_fn", "activation_fn", "activation")

# First entry of diffusers' ``FeedForward.net``: elementwise activation (None: look at its
# ``activation``), gated or not. The gated ones hold the value half first and the gate second.
DIFFUSERS_IN = {
    "GELU": ("gelu", False),
    "ApproximateGELU": ("quick_gelu", False),
    "GEGLU": ("gelu", True),
    "SwiGLU": ("silu", True),
    "LinearActivation": (None, False),
}

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Unreadable(Exception):
    """Why a block cannot be upcycled."""


@dataclass(frozen=True)
class DenseMLP:
    """Weights of a dense MLP in the orientation and order of the kernels.

    Attributes:
        w_in: (F, D), or (2F, D) when gated, gate half first.
        w_out: (D, F).
        bias_in, bias_out: of the rows of ``w_in`` and of D, or ``None``.
        elementwise: activation, a key of ``ELEMENTWISE``.
        gated: ``act(gate) · up`` instead of ``act(up)``.
        trained: whether each of ``tensors`` requires gradients.
    """

    w_in: Tensor
    w_out: Tensor
    bias_in: Tensor | None
    bias_out: Tensor | None
    elementwise: str
    gated: bool
    trained: tuple[bool, bool, bool, bool]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """``w_in``, ``w_out``, ``bias_in``, ``bias_out``."""
        return self.w_in, self.w_out, self.bias_in, self.bias_out

    @property
    def names(self) -> tuple[str, str, str, str]:
        """What ``GroupedExperts`` calls the same ``tensors``."""
        name_in = "gate_up_proj" if self.gated else "up_proj"
        return name_in, "down_proj", f"{name_in}_bias", "down_proj_bias"

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.w_out.shape[0]

    @property
    def intermediate_size(self) -> int:
        """F."""
        return self.w_out.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D) in plain PyTorch."""
        h = F.linear(x, self.w_in, self.bias_in)
        return F.linear(activate(h, self.elementwise, self.gated), self.w_out, self.bias_out)


def looks_like_mlp(module: nn.Module) -> bool:
    """Whether the class name says dense MLP: ``Mlp``, ``LlamaMLP``, ``FeedForward``, ..."""
    return type(module).__name__.lower().endswith(("mlp", "feedforward"))


def read_dense(module: nn.Module) -> DenseMLP:
    """Weights and activation of a block.

    Raises:
        Unreadable: when the block is no MLP that the recipes can represent; says why.
    """
    _refuse_attachments(module)
    if isinstance(getattr(module, "net", None), nn.ModuleList):
        return _read_diffusers(module)
    for names_in, name_out, gated in LAYOUTS:
        if all(hasattr(module, name) for name in (*names_in, name_out)):
            return _read_named(module, names_in, name_out, gated)
    children = ", ".join(name for name, _ in module.named_children()) or "none"
    raise Unreadable(f"unknown layout (submodules: {children})")


def _read_named(
    module: nn.Module, names_in: tuple[str, ...], name_out: str, gated: bool
) -> DenseMLP:
    act_name = next((name for name in ACTIVATION_NAMES if hasattr(module, name)), None)
    if act_name is None:
        raise Unreadable("no attribute act, act_fn, activation_fn or activation")
    for name, child in module.named_children():
        if name not in (*names_in, name_out, act_name):
            _refuse_active(name, child)
    linears_in = [_linear(name, getattr(module, name)) for name in names_in]
    linear_out = _linear(name_out, getattr(module, name_out))
    elementwise = _known_activation(act_name, getattr(module, act_name))
    return _dense(linears_in, linear_out, elementwise, gated)


def _read_diffusers(module: nn.Module) -> DenseMLP:
    net: Any = module.net
    kind = type(net[0]).__name__ if len(net) else "nothing"
    if kind not in DIFFUSERS_IN or len(net) < 3:
        known = ", ".join(DIFFUSERS_IN)
        raise Unreadable(f"net starts with {kind} and has {len(net)} entries; known: {known}")
    elementwise, gated = DIFFUSERS_IN[kind]
    if kind == "GELU" and net[0].approximate == "tanh":
        elementwise = "gelu_tanh"
    if elementwise is None:
        elementwise = _known_activation("net.0.activation", net[0].activation)
    for index in (1, *range(3, len(net))):
        _refuse_active(f"net.{index}", net[index])
    linear_in = _linear("net.0.proj", net[0].proj)
    linear_out = _linear("net.2", net[2])
    return _dense([linear_in], linear_out, elementwise, gated, value_first=gated)


def _dense(
    linears_in: list[nn.Linear],
    linear_out: nn.Linear,
    elementwise: str,
    gated: bool,
    value_first: bool = False,
) -> DenseMLP:
    weights = [linear.weight.detach() for linear in linears_in]
    biases = [linear.bias.detach() for linear in linears_in if linear.bias is not None]
    if len(biases) not in (0, len(weights)):
        raise Unreadable("only one of its gate and up projections has a bias")
    w_in = torch.cat(weights) if len(weights) > 1 else weights[0]
    bias_in = torch.cat(biases) if len(biases) > 1 else (biases[0] if biases else None)
    if value_first:
        w_in = torch.cat(w_in.chunk(2)[::-1])
        bias_in = None if bias_in is None else torch.cat(bias_in.chunk(2)[::-1])
    w_out = linear_out.weight.detach()
    bias_out = None if linear_out.bias is None else linear_out.bias.detach()
    _check_tensors(w_in, w_out, bias_in, bias_out, gated)
    trained = (
        any(linear.weight.requires_grad for linear in linears_in),
        linear_out.weight.requires_grad,
        any(linear.bias.requires_grad for linear in linears_in if linear.bias is not None),
        linear_out.bias is not None and linear_out.bias.requires_grad,
    )
    return DenseMLP(w_in, w_out, bias_in, bias_out, elementwise, gated, trained)


def _check_tensors(
    w_in: Tensor, w_out: Tensor, bias_in: Tensor | None, bias_out: Tensor | None, gated: bool
) -> None:
    out_features, intermediate_size = w_out.shape
    rows_in = 2 * intermediate_size if gated else intermediate_size
    if w_in.shape[1] != out_features:
        raise Unreadable(f"maps {w_in.shape[1]} features to {out_features}; must keep the width")
    if w_in.shape[0] != rows_in:
        raise Unreadable(
            f"its projections give {w_in.shape[0]} and take {intermediate_size} features; "
            f"expected {rows_in} and {intermediate_size}"
        )
    tensors = [tensor for tensor in (w_in, w_out, bias_in, bias_out) if tensor is not None]
    for what in ("dtype", "device"):
        kinds = sorted({str(getattr(tensor, what)) for tensor in tensors})
        if len(kinds) > 1:
            raise Unreadable(f"its weights have more than one {what}: {', '.join(kinds)}")
    if w_in.dtype not in DTYPES:
        raise Unreadable(f"its weights are {w_in.dtype}")


def _linear(name: str, module: object) -> nn.Linear:
    # Exactly nn.Linear: a quantised, parametrised or adapter-wrapped one computes something else.
    if type(module) is not nn.Linear:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise Unreadable(f"{name} is {kind}, not torch.nn.Linear")
    if type(module.weight) is not nn.Parameter:
        raise Unreadable(
            f"{name}.weight is a {type(module.weight).__name__}; shard the model later"
        )
    return module


def _known_activation(name: str, act: object) -> str:
    elementwise = recognise(act)
    if elementwise is None:
        kind = getattr(act, "__name__", type(act).__name__)
        raise Unreadable(f"{name} is {kind}, an activation that the experts do not have")
    return elementwise


def _refuse_active(name: str, module: nn.Module) -> None:
    """Only submodules that do nothing may be left out."""
    if isinstance(module, nn.Identity):
        return
    if isinstance(module, nn.Dropout):
        if module.p == 0:
            return
        raise Unreadable(f"{name} drops {module.p} of its input; set its p to 0 first")
    raise Unreadable(f"has a submodule {name} ({type(module).__name__}) that is not known")


def _refuse_attachments(module: nn.Module) -> None:
    """What hangs on the block itself would be lost with it."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    own += [name for name, _ in module.named_buffers(recurse=False)]
    if own:
        raise Unreadable(f"has a tensor of its own: {', '.join(own)}")
    for name, part in module.named_modules():
        where = name or "the block"
        if "forward" in vars(part):
            raise Unreadable(f"forward of {where} is replaced on the instance")
        hooks = (
            part._forward_hooks,
            part._forward_pre_hooks,
            part._backward_hooks,
            part._backward_pre_hooks,
        )
        if any(hooks):
            raise Unreadable(f"{where} has hooks; remove them first")
