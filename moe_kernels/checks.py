"""Argument checks of the public functions: each error names the argument and shows the values."""

import torch
from torch import Tensor


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}.")


def check_positive_int(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least 1.")


def check_floating(name: str, tensor: object, rank: int, shape_words: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` is a floating-point tensor of the given rank."""
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{name} is a {type(tensor).__name__}; expected a torch.Tensor {shape_words}."
        )
    if tensor.dim() != rank:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected {rank} dimensions {shape_words}."
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype.")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], shape_words: str) -> None:
    """Raise ``ValueError`` unless ``tensor.shape`` equals ``expected``."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected {tuple(expected)} {shape_words}."
        )


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ``ValueError`` unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device} and {other_name} on {other.device}; "
            "move them to one device."
        )


def wants_finite_check(router_logits: Tensor, check_finite: bool | None) -> bool:
    """Whether the router has to refuse NaN and infinities.

    Reading the answer costs a device synchronisation on a GPU and a graph break under
    ``torch.compile``, so ``None`` checks on the CPU in eager mode only.
    """
    if torch.compiler.is_compiling():
        return False
    return router_logits.device.type == "cpu" if check_finite is None else check_finite


def check_finite_logits(router_logits: Tensor) -> None:
    """Raise ``ValueError`` when logits hold NaN or infinities, and say where."""
    finite = torch.isfinite(router_logits)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        first = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"router_logits has {bad} non-finite of {router_logits.numel()} values, the first at "
            f"(token, expert) = {tuple(first)}; expected finite logits. The router or its input "
            "has diverged. Pass check_finite=False to route anyway (NaN ranks last)."
        )
