"""Ctrl-C and SIGTERM as a request to stop after the step under way."""

import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Context in which the first SIGINT or SIGTERM only sets ``signal_number``.

    A second one acts as usual, for those who cannot wait.

    Args:
        repeated: whether a second one does nothing, as for a process of torchrun: a scheduler's
            SIGTERM to all processes comes again from torchrun, which in the end sends SIGKILL.
    """

    def __init__(self, repeated: bool = False) -> None:
        self.signal_number: int | None = None
        self._repeated = repeated
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        if not self._repeated:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
