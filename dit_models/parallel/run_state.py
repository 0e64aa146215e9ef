"""What a run consists of, as tensors by name: the form that sharded checkpoints hold."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# name -> (shape, dtype)
Stored = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def state_tensors(
    model: nn.Module,
    ema: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """All tensors of a run: ``model.*``, ``ema.*``, ``optimizer.<parameter>.<what>`` and the
    random generator's state.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.items()}
    for name, parameter in model.named_parameters():
        for what, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{what}"] = value
    tensors["rng.generator"] = generator.get_state()
    return tensors


def prepare_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, stored: Stored) -> None:
    """Give an optimizer that has not taken a step the state that ``stored`` describes, as zeros."""
    fused = bool(optimizer.defaults.get("fused"))
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        state: dict[str, Any] = {}
        for key, (shape, dtype) in stored.items():
            if not key.startswith(prefix):
                continue
            if shape == tuple(parameter.shape):
                state[key.removeprefix(prefix)] = torch.zeros_like(parameter, dtype=dtype)
            else:  # the number of steps, which only a fused optimizer keeps on the device
                device = parameter.device if fused else "cpu"
                value = torch.zeros(shape, dtype=dtype, device=device)
                state[key.removeprefix(prefix)] = value
        if state:
            optimizer.state[parameter] = state


def optimizer_shapes(state_dict: Mapping[str, Any], names: list[str]) -> Stored:
    """The names, shapes and types of a one-process optimizer's state.

    Args:
        state_dict: of the optimizer, where parameters are numbered.
        names: of the parameters, in that order.
    """
    return {
        f"optimizer.{names[number]}.{what}": (tuple(value.shape), value.dtype)
        for number, values in state_dict["state"].items()
        for what, value in values.items()
        if isinstance(value, Tensor)
    }


def refresh_buffers(model: nn.Module) -> None:
    """Let modules that keep a buffer's value on the host read it again."""
    parameters = {name for name, _ in model.named_parameters()}
    buffers = {
        name: value.clone() for name, value in model.state_dict().items() if name not in parameters
    }
    model.load_state_dict(buffers, strict=False)
