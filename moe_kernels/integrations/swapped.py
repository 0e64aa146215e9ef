"""The class of a swapped block: a subclass of the block's own class, made once for each.

The instance keeps its parameters, buffers, hooks and state-dict keys. Because the behaviour is in
the class and not in a closure on the instance, copies (EMA) and pickles compute with their own
weights, and a compiled model sees that the block has changed.
"""

import functools
import logging
from typing import Any

from torch import Tensor, nn

from moe_kernels.integrations.adapter import Adapter
from moe_kernels.integrations.packing import seen_alone

logger = logging.getLogger("moe_kernels")


class Swapped:
    """Marks the class of a swapped block.

    Attributes:
        adapter: who serves it.
        original_class: what it was, and what ``revert`` makes it again.
    """

    adapter: Adapter
    original_class: type[nn.Module]


_classes: dict[tuple[str, type[nn.Module]], type[nn.Module]] = {}


def swapped_class(adapter: Adapter, original: type[nn.Module]) -> type[nn.Module]:
    """The class that a block of class ``original`` gets."""
    key = (adapter.family, original)
    if key not in _classes:
        _classes[key] = _make_class(adapter, original)
    return _classes[key]


def _make_class(adapter: Adapter, original: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        reason = adapter.changed(self)
        if reason is None:
            return adapter.forward(self, *args, **kwargs)
        _log_original(original.__name__, reason)
        return original.forward(self, *args, **kwargs)

    def apply_to_tensors(self: Any, fn: Any, recurse: bool = True) -> Any:
        result = original._apply(self, fn, recurse)
        adapter.pack(self)  # .to(), .half(), .cuda() have moved each weight for itself
        return result

    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = original.state_dict(self, *args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name, value in state.items():
            if name.startswith(prefix) and isinstance(value, Tensor):
                state[name] = seen_alone(value)
        return state

    def set_state(self: Any, state: dict[str, Any]) -> None:
        original.__setstate__(self, state)
        adapter.pack(self)  # so have deepcopy and unpickling

    def reduce(self: Any, protocol: Any) -> Any:
        return _rebuild, (adapter.family, original), self.__getstate__()

    members = {
        "forward": forward,
        "_apply": apply_to_tensors,
        "state_dict": state_dict,
        "__setstate__": set_state,
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "adapter": adapter,
        "original_class": original,
    }
    return type(original.__name__, (Swapped, original), members)


def repack_after_load(module: nn.Module, incompatible_keys: Any) -> None:
    """Hook of ``load_state_dict``, which with ``assign=True`` replaces the weights."""
    if isinstance(module, Swapped):
        module.adapter.pack(module)


def _rebuild(family: str, original: type[nn.Module]) -> nn.Module:
    """An instance without state, for ``copy`` and ``pickle``."""
    from moe_kernels.integrations import ADAPTERS

    adapter = next((adapter for adapter in ADAPTERS if adapter.family == family), None)
    if adapter is None:
        raise ValueError(
            f"this {original.__name__} was swapped for the family {family!r}, which this version "
            "of moe_kernels does not know; revert() the model before it is pickled."
        )
    cls = swapped_class(adapter, original)
    return cls.__new__(cls)


_logged: set[str] = set()


def _log_original(class_name: str, reason: str) -> None:
    message = f"a swapped {class_name} runs its original forward, because {reason}"
    if message not in _logged:
        _logged.add(message)
        logger.warning(message)
