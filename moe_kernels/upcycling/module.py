"""``UpcycledMLP``, the block that takes a dense MLP's place, and the way to its routing plans."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from moe_kernels.layers import ExpertChoiceRouter, GroupedExperts, TokenChoiceRouter
from moe_kernels.plan import RoutingPlan

COMPILED = "_orig_mod"  # where torch.compile keeps the module that it wraps


class UpcycledMLP(nn.Module):
    """A mixture of experts with the call signature of the dense MLP that it replaces.

    ``out = experts(x, router(x)) + shared_expert(x)``. The first dimension of x is the batch, the
    last D, all between are tokens of one image; (T, D) is one image of T tokens. Further arguments
    are ignored, as diffusers' ``FeedForward`` ignores ``scale``.

    Args:
        router: for the same D and E as the experts.
        experts: the routed experts.
        shared_expert: a module that every token passes (here the dense MLP itself), or ``None``.
    """

    def __init__(
        self,
        router: ExpertChoiceRouter | TokenChoiceRouter,
        experts: GroupedExperts,
        shared_expert: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared_expert = shared_expert
        self._collected: list[RoutingPlan] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., D) to (..., D) in the dtype of ``x``."""
        out, plan = self.forward_with_plan(x)
        if self._collected is not None:
            self._collected.append(plan)
        return out

    def forward_with_plan(self, x: Tensor) -> tuple[Tensor, RoutingPlan]:
        """``forward``'s result and the ``RoutingPlan`` behind it."""
        hidden_size = self.router.hidden_size
        if x.shape[-1] != hidden_size:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected {hidden_size} features in the last "
                "dimension."
            )
        images = x.reshape(1, -1, hidden_size) if x.dim() < 3 else x.flatten(1, -2)  # (B, S, D)
        plan = self.router(images)
        shared: Tensor | Callable[[], Tensor] | None = None
        if self.shared_expert is not None:
            shared = partial(self._shared_term, x)
            if self.experts.parallel is None:
                shared = shared()  # else the experts call it, while rows travel
        return self.experts(images.flatten(0, 1), plan, shared).view(x.shape), plan

    def _shared_term(self, x: Tensor) -> Tensor:
        assert self.shared_expert is not None
        shared: Tensor = self.shared_expert(x).reshape(-1, self.router.hidden_size)
        return shared


@contextmanager
def collect_plans(model: nn.Module) -> Iterator[dict[str, list[RoutingPlan]]]:
    """Collect the routing of every ``UpcycledMLP`` while the context is open.

    ``with collect_plans(model) as plans: out = model(x)``, then for example
    ``loss = task_loss + 0.01 * sum(load_balance_loss(p) for ps in plans.values() for p in ps)``.

    The plans belong to the dictionary: outside the context the model keeps none. A block that runs
    several times adds a plan each time; leave the context before ``backward`` when activation
    checkpointing recomputes blocks. Under ``torch.compile`` there is one graph that collects and
    one that does not, each compiled when first needed.

    Args:
        model: any module that holds ``UpcycledMLP`` s.

    Yields:
        The plans of each block by its path (without what torch.compile adds), in the order of the
        calls.

    Raises:
        ValueError: when the model holds no ``UpcycledMLP``.
    """
    plans: dict[str, list[RoutingPlan]] = {}
    blocks = [
        (clean_path(path), module)
        for path, module in model.named_modules()
        if isinstance(module, UpcycledMLP)
    ]
    if not blocks:
        raise ValueError(f"{type(model).__name__} holds no UpcycledMLP; run upcycle(model) first.")
    outer = [block._collected for _, block in blocks]
    try:
        for path, block in blocks:
            plans[path] = block._collected = []
        yield plans
    finally:
        for (_, block), before in zip(blocks, outer, strict=True):
            block._collected = before


def clean_path(path: str) -> str:
    """The path as it is without torch.compile."""
    return ".".join(name for name in path.split(".") if name != COMPILED)
