"""A run's state from a checkpoint of any number of processes, into this number of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from dit_models.checkpoints import load_training_state
from dit_models.parallel.run_state import (
    optimizer_shapes,
    prepare_optimizer,
    refresh_buffers,
    state_tensors,
)
from dit_models.parallel.sharded_checkpoints import (
    is_sharded,
    load_sharded,
    load_single_process,
    read_plain,
    stored_tensors,
    verify_sharded,
)


def restore(
    checkpoint: Path,
    model: nn.Module,
    ema: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    check: Callable[[dict[str, Any]], None],
    process_group: distributed.ProcessGroup | None,
) -> dict[str, Any]:
    """Verify a checkpoint, and fill a run that has not taken a step with what it holds.

    Args:
        checkpoint: of one process or of several.
        model: whole, or divided by ``Sharding``.
        ema: the averages, named as in the model's state dict.
        optimizer: of the model's parameters.
        generator: of the run's random numbers.
        check: gets the plain values before anything is changed; raises where they do not fit.
        process_group: the host group of the processes that load together; ``None`` for one.

    Returns:
        The plain values: step, loader state, times and configuration.

    Raises:
        CheckpointError: a damaged or ill-fitting checkpoint; the same in all processes.
    """
    verify_sharded(checkpoint, process_group)
    names = [name for name, _ in model.named_parameters()]
    if is_sharded(checkpoint):
        state, stored = read_plain(checkpoint), stored_tensors(checkpoint)
    else:
        state = load_training_state(checkpoint)
        stored = dict(optimizer_shapes(state["optimizer"], names))
    check(state)
    prepare_optimizer(model, optimizer, stored)
    tensors = state_tensors(model, ema, optimizer, generator)
    if is_sharded(checkpoint):
        load_sharded(checkpoint, tensors, process_group)
    else:
        load_single_process(checkpoint, tensors, names, process_group)
    generator.set_state(tensors["rng.generator"])
    refresh_buffers(model)
    return state
