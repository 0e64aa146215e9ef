"""What an adapter of one family of blocks has to give."""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Adapter:
    """Serves the blocks of one family; one instance for all of them, without state.

    Attributes:
        family: name in reports, unique.
        class_names: classes that it knows, by name: the packages they come from are not imported.
        differentiable_in_eval: whether the original's gradients are right in eval mode, too. The
            swapped block's are in any case.
    """

    family: ClassVar[str]
    class_names: ClassVar[tuple[str, ...]]
    differentiable_in_eval: ClassVar[bool] = True

    def matches(self, module: nn.Module, class_name: str) -> bool:
        """Whether this is a block of the family; ``class_name`` without what FSDP put before it."""
        return class_name in self.class_names

    def why_not(self, module: nn.Module) -> str | None:
        """Why a module of a known class cannot be served; ``None`` if it can."""
        raise NotImplementedError

    def describe(self, module: nn.Module) -> str:
        """What the block is made of, for the report."""
        raise NotImplementedError

    def pack(self, module: nn.Module) -> str | None:
        """Put the weights into the form that ``forward`` wants; a reason where they stay apart.

        Called after the swap and whenever weights have been moved, loaded or copied.
        """
        return None

    def changed(self, module: nn.Module) -> str | None:
        """Why the original has to run after all, asked at every call: keep it cheap.

        What is bypassed may have been given hooks, adapters (LoRA) or another class since.
        """
        return None

    def differentiable(self, module: nn.Module) -> bool:
        """Whether the original's gradients are right in the mode that the block is in."""
        return module.training or self.differentiable_in_eval

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The block's forward on the kernels; signature and result are the original's."""
        raise NotImplementedError

    def exact(self, original: Any) -> nn.Module:
        """A copy of an original block that computes in fp64, for comparisons."""
        return copy.deepcopy(original).double()

    def example(self, module: nn.Module, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random arguments of ``forward``, in the dtype and on the device of the weights."""
        raise NotImplementedError


def backend_of(module: nn.Module) -> str | None:
    """The backend that ``moe_kernels.apply`` was asked for; ``None`` is the automatic choice."""
    return module.__dict__.get("_moe_kernels_backend")


def why_bypassing_is_wrong(
    module: nn.Module, path: str, class_name: str | None = None
) -> str | None:
    """Why reading this module's weights would not do what calling it does.

    Args:
        module: that is bypassed.
        path: where it is in the block.
        class_name: of what is known to be bypassed rightly; ``None`` for any.
    """
    # A parametrization (LoRA on stacked experts) is a class, too, but reading its weights is right.
    name = type(module).__name__.removeprefix("Parametrized")
    if class_name is not None and name != class_name:
        return f"{path} is a {name}, not a {class_name}"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{path} has forward hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return f"{path} has backward hooks"
    if "forward" in module.__dict__:
        return f"the forward of {path} was replaced on the instance"
    return None


def missing_attributes(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Which of the attributes that the adapter reads are not there."""
    missing = [name for name in names if not hasattr(module, name)]
    return f"it has no {', '.join(missing)}" if missing else None


def random_tokens(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in the dtype and on the device of ``like``."""
    numbers = torch.randn(shape, generator=generator)
    return numbers.to(like.device, like.dtype)
