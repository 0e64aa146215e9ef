"""Checkpoints of several processes: written in the background, resharded when loaded.

Tensors are ``DTensor`` s, of which each process writes its part, or plain tensors that all
processes hold alike. A checkpoint appears under its name when all of it is on the disk.
"""

import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dit_models.checkpoints import (
    INDEX_NAME,
    CheckpointError,
    list_checkpoints,
    load_training_state,
    read_manifest,
    remove_unfinished,
    verify_files,
)
from dit_models.parallel.checkpoint_files import (
    JoinedTensor,
    in_one_piece,
    is_sharded,
    read_index,
    read_plain,
    stored_tensors,
)
from dit_models.parallel.checkpoint_storage import (
    CheckpointStorageWriter,
    JoinedTensorReader,
    digests_of_plain,
)
from dit_models.tensor_files import DTYPE_NAMES, StoredTensor, read_header

__all__ = [
    "CheckpointWriter",
    "is_sharded",
    "load_sharded",
    "load_single_process",
    "newest_checkpoint",
    "read_plain",
    "stored_tensors",
    "verify_sharded",
]

Group = distributed.ProcessGroup | None
T = TypeVar("T")
# A save waits for the slowest disk; the collectives of training have their own, shorter limit.
_TIMEOUT = timedelta(hours=1)


class CheckpointWriter:
    """Writes checkpoints while training goes on; every method is collective.

    ``save`` copies the state to the host, which takes the memory of this process's part once
    more, and a thread writes the copy. One save is under way at a time.

    Args:
        folder: the run's checkpoint folder, the same for all processes. What a killed process
            left there is removed.
        keep: newest checkpoints to keep.
        process_group: the processes that save together; ``None`` for all. A gloo group of the
            same processes is made for the thread.
    """

    def __init__(self, folder: Path, keep: int, process_group: Group = None) -> None:
        self.folder = folder
        self.keep = keep
        self._group: Group = None
        if distributed.is_initialized():
            ranks = distributed.get_process_group_ranks(process_group or distributed.group.WORLD)
            # Its own: collectives of two threads on one group could be taken for each other's.
            self._group = distributed.new_group(ranks, timeout=_TIMEOUT, backend="gloo")
        self._thread: threading.Thread | None = None
        self._messages: list[str] = []
        self._notes: list[str] = []
        self._newest = newest_checkpoint(folder, self._group)

    def save(self, step: int, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Copy the state now and write ``folder/step_XXXXXXXX`` in the background.

        Waits first for a save that is under way. A checkpoint of this step that exists is left as
        it is.

        Args:
            step: optimizer steps done.
            tensors: ``DTensor`` s, and plain tensors that are equal in all processes.
            plain: values for JSON, of which those of the first process are kept.

        Raises:
            ValueError: a dtype that safetensors files do not know.
        """
        self.wait()
        if unknown := [name for name, value in tensors.items() if value.dtype not in DTYPE_NAMES]:
            raise ValueError(f"{unknown[0]} is of {tensors[unknown[0]].dtype}, which has no file.")
        staged = {name: _on_host(value) for name, value in tensors.items()}
        self._thread = threading.Thread(
            target=self._write, args=(step, staged, dict(plain)), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> Path | None:
        """Wait until no save is under way and return the newest complete checkpoint.

        Warns in the first process of what was saved in doubt.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        notes, self._notes = self._notes, []
        if _place(self._group)[0] == 0:
            for note in notes:
                warnings.warn(note, stacklevel=2)
        return self._newest

    def failures(self) -> list[str]:
        """Why saves failed since the last call; the same in all processes after ``wait``."""
        messages, self._messages = self._messages, []
        return messages

    def close(self) -> None:
        """Wait for the save under way."""
        self.wait()

    def _write(self, step: int, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        target = self.folder / f"step_{step:08d}"
        try:
            if not _lead(target.exists, self._group):
                self._write_new(target, step, tensors, plain)
        # The first is a BaseException. Whatever it was, training goes on without this checkpoint.
        except (CheckpointException, Exception) as error:
            self._messages.append(f"{target} was not saved: {_reason(error)}")
            return
        self._newest = target
        if _place(self._group)[0] == 0:
            self._remove_old()

    def _write_new(
        self, target: Path, step: int, tensors: dict[str, Tensor], plain: dict[str, Any]
    ) -> None:
        writer = CheckpointStorageWriter(target, step, plain, digests_of_plain(tensors))
        try:
            with _one_process_allowed():
                dcp.save(
                    tensors,
                    storage_writer=writer,
                    process_group=self._group,
                    no_dist=self._group is None,
                )
        except CheckpointException:
            # All know of the failure, and go on when what was written is gone.
            _lead(writer.remove_unfinished, self._group)
            raise
        except Exception:
            if _place(self._group)[0] == 0:
                writer.remove_unfinished()
            raise
        if names := _lead(lambda: writer.differing, self._group):
            self._notes.append(
                f"{target} holds the first process's values of {', '.join(names)}, which differ "
                "between the processes: a run that goes on from it is another one."
            )

    def _remove_old(self) -> None:
        try:
            for old in list_checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(old)
        except OSError as error:
            self._notes.append(f"an old checkpoint could not be removed: {error}")


def _on_host(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def newest_checkpoint(folder: Path, process_group: Group = None) -> Path | None:
    """The newest checkpoint, as the first process finds it; unfinished ones are removed."""

    def find() -> Path | None:
        remove_unfinished(folder)
        return next(reversed(list_checkpoints(folder)), None)

    return _lead(find, process_group)


def verify_sharded(checkpoint: Path, process_group: Group = None) -> int:
    """Check every file of a checkpoint of either kind, files divided among the processes.

    Returns:
        The step.

    Raises:
        CheckpointError: in all processes the same, naming what is missing or damaged.
    """
    rank, size = _place(process_group)
    step, problem = 0, None
    try:
        step, hashes = read_manifest(checkpoint)
        verify_files(checkpoint, sorted(hashes)[rank::size], hashes)
        if INDEX_NAME in hashes:
            read_index(checkpoint)
            read_plain(checkpoint)
    except CheckpointError as error:
        problem = str(error)
    _raise_first(problem, process_group)
    return step


def load_sharded(
    checkpoint: Path, tensors: Mapping[str, Tensor], process_group: Group = None
) -> None:
    """Fill tensors in place with what a verified checkpoint has of them, on any mesh.

    Args:
        checkpoint: written by any number of processes.
        tensors: ``DTensor`` s and plain tensors by their names in the checkpoint, which may hold
            more. In one process without ``torch.distributed`` all are plain.
        process_group: the processes that load together; ``None`` for all.

    Raises:
        CheckpointError: a name, shape or dtype is not that of the checkpoint, or reading fails;
            in all processes the same.
    """
    _load(checkpoint, lambda: read_index(checkpoint), tensors, process_group)


def load_single_process(
    checkpoint: Path,
    tensors: Mapping[str, Tensor],
    parameter_names: list[str],
    process_group: Group = None,
) -> dict[str, Any]:
    """Fill tensors in place from a verified checkpoint of one process, as ``load_sharded`` does.

    Args:
        checkpoint: written by ``dit_models.checkpoints.save_checkpoint``.
        tensors: named "model.*", "ema.*", "optimizer.PARAMETER.*" and "rng.generator".
        parameter_names: in the order of the model's ``parameters()``, by which the optimizer's
            state is numbered.
        process_group: the processes that load together; ``None`` for all.

    Returns:
        What ``read_plain`` returns of a sharded checkpoint.

    Raises:
        CheckpointError: as ``load_sharded``.
    """
    state: dict[str, Any] = {}

    def read() -> dict[str, JoinedTensor]:
        state.update(load_training_state(checkpoint))
        found: dict[str, Any] = {"rng.generator": state["rng"]["generator"]}
        for kind in ("model", "ema"):
            stored = read_header(checkpoint / f"{kind}.safetensors")
            found |= {f"{kind}.{name}": value for name, value in stored.items()}
        for number, values in state["optimizer"]["state"].items():
            prefix = f"optimizer.{parameter_names[number]}"
            found |= {f"{prefix}.{key}": value for key, value in values.items()}
        return {
            name: in_one_piece(value)
            for name, value in found.items()
            if isinstance(value, Tensor | StoredTensor)
        }

    _load(checkpoint, read, tensors, process_group)
    names = ("config", "step", "loader", "train_seconds", "wall_seconds")
    return {name: state[name] for name in names}


def _load(
    checkpoint: Path,
    source: Callable[[], dict[str, JoinedTensor]],
    tensors: Mapping[str, Tensor],
    group: Group,
) -> None:
    stored: dict[str, JoinedTensor] = {}
    problem = None
    try:
        stored = source()
        problem = _misfit(checkpoint, stored, tensors)
    except (CheckpointError, ValueError, OSError) as error:
        problem = str(error)
    _raise_first(problem, group)
    try:
        with _one_process_allowed():
            dcp.load(
                dict(tensors),
                storage_reader=JoinedTensorReader(stored),
                process_group=group,
                no_dist=not distributed.is_initialized(),
            )
    except CheckpointException as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {_reason(error)}") from error


def _misfit(
    checkpoint: Path, stored: Mapping[str, JoinedTensor], tensors: Mapping[str, Tensor]
) -> str | None:
    if missing := [name for name in tensors if name not in stored]:
        listed = ", ".join(missing[:5]) + (" and more" if len(missing) > 5 else "")
        return f"{checkpoint} lacks {len(missing)} tensors of the model: {listed}."
    for name, value in tensors.items():
        found, expected = stored[name], (tuple(value.shape), value.dtype)
        if (found.shape, found.dtype) != expected:
            return (
                f"{checkpoint}: {name} is {list(found.shape)} of {found.dtype}; the model has "
                f"{list(expected[0])} of {expected[1]}."
            )
    return None


def _place(group: Group) -> tuple[int, int]:
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(group), distributed.get_world_size(group)


def _lead(work: Callable[[], T], group: Group) -> T:
    """The first process works; the others get what it returns, or its exception."""
    rank, size = _place(group)
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome = [work(), None]
        except OSError as failure:
            outcome = [None, failure]
    if size > 1:
        first = distributed.get_process_group_ranks(group or distributed.group.WORLD)[0]
        distributed.broadcast_object_list(outcome, first, group=group)
    value, error = outcome
    if error is not None:
        raise error
    return value


def _raise_first(problem: str | None, group: Group) -> None:
    """Raise the first problem that any process has, in all of them."""
    size = _place(group)[1]
    problems: list[Any] = [problem] * size
    if size > 1:
        distributed.all_gather_object(problems, problem, group=group)
    if found := [text for text in problems if text is not None]:
        raise CheckpointError(found[0])


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return "; ".join(
            f"rank {rank}: {_reason(cause)}" for rank, (cause, _) in sorted(error.failures.items())
        )
    return f"{type(error).__name__}: {error}"


@contextmanager
def _one_process_allowed() -> Iterator[None]:
    """PyTorch warns where there is one process; filters of warnings are those of all threads."""
    if distributed.is_initialized():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        yield
