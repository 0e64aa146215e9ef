"""Endless batches, each a pure function of the seed and the batch number."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dit_models.data.base import Batch, DatasetInfo, ImageDataset, Sample, pad_rows

# The two kinds of random stream under one seed; without a tag, epoch 3 and position 3 would share.
_ORDER_STREAM, _SAMPLE_STREAM = 0, 1
_CHECKED_KEYS = ("dataset", "length", "batch_size", "seed")


def collate(samples: list[Sample], info: DatasetInfo) -> Batch:
    """Stack samples into a batch."""
    text: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if info.text is not None:
        rows = [sample.text for sample in samples if sample.text is not None]
        text = pad_rows(rows, info.text["max_length"])
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        labels=torch.tensor([sample.label for sample in samples]) if info.num_classes else None,
        captions=[sample.caption for sample in samples] if info.has_captions else None,
        text=text[0],
        text_mask=text[1],
    )


def _obey_the_parent_alone(worker: int) -> None:
    """Ctrl-C reaches workers too, and so does SIGTERM from torchrun or a scheduler.

    The parent decides what happens, and still needs them to save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, which cannot tell who sent a signal
        threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


@contextmanager
def _sigterm_held_back() -> Iterator[None]:
    """Context in which workers are started: every thread of theirs then has SIGTERM blocked.

    Blocked in the worker itself it would be too late for threads that libraries start there before,
    and the signal goes to any thread that takes it.
    """
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_when_the_parent_says() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


class _ByPosition(Dataset[Sample]):
    """The endless sequence of samples: position p is sample p mod length of epoch p // length."""

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __getitem__(self, position: int) -> Sample:
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, _ORDER_STREAM, epoch])
            self._order = rng.permutation(len(self.dataset))
            self._epoch = epoch
        rng = np.random.default_rng([self.seed, _SAMPLE_STREAM, position])
        return self.dataset.sample(int(self._order[offset]), rng)


class _BatchPositions(Sampler[list[int]]):
    """Lists of positions, from batch ``start`` on, without end."""

    def __init__(self, batch_size: int, start: int, part: range) -> None:
        self.batch_size = batch_size
        self.start = start
        self.part = part

    def __iter__(self) -> Iterator[list[int]]:
        number = self.start
        while True:
            yield [number * self.batch_size + place for place in self.part]
            number += 1


class BatchLoader:
    """Iterator over shuffled batches that never ends and resumes exactly.

    Batch n holds positions n·B .. n·B + B - 1 of the endless sequence of epochs; an epoch is a
    permutation drawn from (seed, epoch) and each sample's ``rng`` is drawn from (seed, position).
    So a batch depends on neither the batches before it nor the number of workers, and no global
    random state is read or written. Batches run over the end of an epoch into the next.

    Args:
        dataset: where samples come from.
        batch_size: B; may exceed the length of the data set.
        seed: at least 0.
        num_workers: processes that prepare batches ahead; 0 prepares them on the spot.
        start: number of the first batch.
        part: which samples of every batch are loaded, where processes share it; ``None`` = all.

    Attributes:
        position: number of the batch that comes next.

    Raises:
        ValueError: an argument out of range, or an empty data set.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        start: int = 0,
        part: slice | None = None,
    ) -> None:
        if len(dataset) < 1:
            raise ValueError(f"the data set {dataset.info.name!r} is empty")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        for name, value in (("seed", seed), ("num_workers", num_workers), ("start", start)):
            if value < 0:
                raise ValueError(f"{name} is {value}; expected at least 0")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.position = start
        self._part = range(batch_size)[part or slice(None)]
        self._samples = _ByPosition(dataset, seed)
        self._stream: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.num_workers == 0:
            batch = self.batch(self.position)
        else:
            if self._stream is None:
                self._stream = self._start_workers()
            batch = next(self._stream)
        self.position += 1
        return batch

    def batch(self, number: int) -> Batch:
        """Batch ``number``, made here and now; the loader's position stays."""
        first = number * self.batch_size
        samples = [self._samples[first + place] for place in self._part]
        return collate(samples, self.dataset.info)

    def state_dict(self) -> dict[str, Any]:
        """Position and what it is counted in, as plain numbers and strings."""
        return {
            "dataset": self.dataset.info.name,
            "length": len(self.dataset),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "position": self.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the loader that gave ``state`` stood.

        Raises:
            ValueError: shows both values where data set, length, batch size or seed differ.
        """
        mine = self.state_dict()
        if missing := [key for key in mine if key not in state]:
            raise ValueError(f"the loader state lacks {', '.join(missing)}; it has {sorted(state)}")
        for key in _CHECKED_KEYS:
            if state[key] != mine[key]:
                raise ValueError(
                    f"the loader state has {key} = {state[key]!r} and this loader {mine[key]!r}; "
                    "batches would differ, so resume with the same settings"
                )
        position = state["position"]
        if not isinstance(position, int) or position < 0:
            raise ValueError(f"the loader state has position = {position!r}; expected at least 0")
        self.position = position
        self._stream = None  # workers under way are ahead of the old position

    def _start_workers(self) -> Iterator[Batch]:
        loader = DataLoader(
            self._samples,
            batch_sampler=_BatchPositions(self.batch_size, self.position, self._part),
            num_workers=self.num_workers,
            collate_fn=partial(collate, info=self.dataset.info),
            # Its own generator: DataLoader otherwise draws a worker seed from the global one.
            generator=torch.Generator().manual_seed(self.seed),
            worker_init_fn=_obey_the_parent_alone,
        )
        with _sigterm_held_back():
            return iter(loader)
