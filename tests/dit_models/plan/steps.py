"""Real training steps: the most that PyTorch's allocator held in one, and the bytes it sent."""

import gc
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch._C._profiler import _EventType

from dit_models.config_io import build_config
from dit_models.model_config import ModelConfig
from dit_models.parallel.world import join_world
from dit_models.trainer import Trainer
from moe_kernels.backends.cpu import experts, memory
from moe_kernels.backends.cpu.products import Products


@dataclass(frozen=True)
class Step:
    """Bytes of the second step; ``during`` is the most that it allocated, gradients included.

    ``sent`` has the bytes that a rank of a ring passes on in all-gathers and reduce-scatters, and
    those of rows and of their numbers to other ranks.
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    during: int
    sent: dict[str, float]


def measure(runs: list[list[str]]) -> list[tuple[Step, ModelConfig]]:
    """Train two steps with each of these options.

    Everything is made to come from PyTorch's allocator, where the profiler sees it: large results
    do not come from ``csrc/memory.cpp``, and the experts' products are PyTorch's.
    """
    memory.LARGE_BYTES = 1 << 60
    experts.PRODUCTS = Products(reason="the profiler does not see scratch memory of C++")
    return [_second_step(overrides) for overrides in runs]


def _second_step(overrides: list[str]) -> tuple[Step, ModelConfig]:
    with tempfile.TemporaryDirectory() as folder:
        config = build_config("digits", overrides=[*overrides, f"run_dir={folder}", "steps=4"])
        with join_world(config.parallel, config.device) as world:
            trainer = Trainer(config, Path(folder), world)
            if config.optimizer.kind == "rmsprop":  # as PyTorch decides for CUDA
                for group in trainer.optimizer.param_groups:
                    group["foreach"] = True
            trainer.train_step()
            trainer.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            activity = [torch.profiler.ProfilerActivity.CPU]
            with (
                _counted() as sent,
                torch.profiler.profile(activities=activity, profile_memory=True) as profile,
            ):
                trainer.train_step()
            states = trainer.optimizer.state.values()
            step = Step(
                parameters=_bytes(p.detach() for p in trainer.model.parameters()),
                gradients=_bytes(p.grad for p in trainer.model.parameters()),
                optimizer=_bytes(v for state in states for v in state.values()),
                ema=_bytes(_averages(trainer)),
                during=peak_of(profile),
                sent=sent,
            )
            return step, trainer.model.backbone.config


@contextmanager
def _counted() -> Iterator[dict[str, float]]:
    """Count what passes through the collectives of weights, gradients, rows and their numbers."""
    sent = {"gather": 0.0, "scatter": 0.0, "rows": 0.0, "counts": 0.0}
    originals: dict[str, Callable[..., Any]] = {}

    def count(name: str, kind: str, of: Callable[[Any, Any], Tensor]) -> None:
        if not hasattr(distributed, name):
            return
        original = originals[name] = getattr(distributed, name)

        def counting(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            output = args[0] if args else kwargs.get("output_tensor", kwargs.get("output"))
            source = args[1] if len(args) > 1 else kwargs.get("input_tensor", kwargs.get("input"))
            moved = of(output, source)
            size = distributed.get_world_size(group)
            own = "counts" if kind == "rows" and moved.dtype == torch.int32 else kind
            if own == "counts" or moved.is_floating_point():  # no other indices
                sent[own] += moved.numel() * moved.element_size() * (size - 1) / size
            return original(*args, group=group, **kwargs)

        setattr(distributed, name, counting)

    # PyTorch has renamed them: fully_shard calls the one or the other.
    for name in ("all_gather_single", "all_gather_into_tensor"):
        count(name, "gather", lambda output, _: output)
    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
        count(name, "scatter", lambda _, source: source)
    count("all_to_all_single", "rows", lambda _, source: source)
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)


def _averages(trainer: Trainer) -> Iterable[Tensor]:
    ema: Any = trainer.ema
    if trainer.world.size == 1:
        return ema.model.parameters()
    return [ema.tensors[name] for name, _ in trainer.model.named_parameters()]


def _bytes(tensors: Iterable[Any]) -> int:
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    # AdamW's counts of steps are scalars.
    return sum(t.numel() * t.element_size() for t in local if t.ndim)


def peak_of(profile: Any) -> int:
    """Largest sum of what was allocated and not yet freed since the profile began.

    Without what gloo allocates inside a collective: other backends have no such scratch memory.
    """
    scratch: set[int] = set()
    changes = []
    events = profile.profiler.kineto_results.experimental_event_tree()
    for event in sorted(_with_children(events), key=lambda each: each.start_time_ns):
        if event.tag != _EventType.Allocation:
            continue
        fields = event.extra_fields
        if fields.alloc_size > 0 and _inside_collective(event):
            scratch.add(fields.ptr)
        elif fields.ptr in scratch:
            scratch.remove(fields.ptr)
        else:
            changes.append(fields.alloc_size)
    return max(accumulate(changes))


def _with_children(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _with_children(event.children)


def _inside_collective(event: Any) -> bool:
    while event is not None:
        if event.name.startswith(("c10d::", "gloo:")):
            return True
        event = event.parent
    return False
