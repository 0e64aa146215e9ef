"""The weights in a checkpoint of either kind, read when needed."""

from pathlib import Path

from torch import nn

from dit_models.checkpoints import CheckpointError
from dit_models.parallel.checkpoint_files import JoinedTensor, in_one_piece, is_sharded, read_index
from dit_models.tensor_files import check_names, read_header


def stored_weights(checkpoint: Path, kind: str) -> dict[str, JoinedTensor]:
    """Weights of a verified checkpoint by their names in the model; nothing is read yet.

    Args:
        checkpoint: of one process or of several.
        kind: "model", or "ema" for the averaged weights.

    Raises:
        CheckpointError: what lists them is missing or damaged.
    """
    if is_sharded(checkpoint):
        prefix = f"{kind}."
        return {
            name.removeprefix(prefix): value
            for name, value in read_index(checkpoint).items()
            if name.startswith(prefix)
        }
    try:
        stored = read_header(checkpoint / f"{kind}.safetensors")
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from error
    return {name: in_one_piece(value) for name, value in stored.items()}


def check_fit(checkpoint: Path, weights: dict[str, JoinedTensor], module: nn.Module) -> None:
    """Raise ``CheckpointError`` unless names and shapes are those of the module's state."""
    state = module.state_dict(keep_vars=True)
    try:
        check_names(weights, state, str(checkpoint))
    except ValueError as error:
        raise CheckpointError(f"the weights do not fit the model: {error}") from error
    for name, target in state.items():
        if weights[name].shape != tuple(target.shape):
            raise CheckpointError(
                f"{checkpoint}: {name} has shape {list(weights[name].shape)}; the model has "
                f"{list(target.shape)}."
            )


def load_stored_weights(checkpoint: Path, kind: str, module: nn.Module) -> None:
    """Load ``model`` or ``ema`` weights of a verified checkpoint of either kind into a module.

    Raises:
        CheckpointError: when the weights do not fit the module, with the differing keys.
    """
    weights = stored_weights(checkpoint, kind)
    check_fit(checkpoint, weights, module)
    try:
        module.load_state_dict({name: value.read() for name, value in weights.items()})
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} does not fit the model: {error}") from error
