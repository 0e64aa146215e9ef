"""The time of a run: how much is left, and an end to what takes longer than it may."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.gpu.time_limit import time_limit

# Report and pictures (18 took 6 s on two cores); at most this share of a short run.
FINISH_SECONDS = 30.0
FINISH_SHARE = 0.2


class OutOfTime(BaseException):
    """Not an ``Exception``, so that nothing takes it for a provider's own error."""


class Budget:
    """What is left of the time of a run; without a limit, always enough.

    Args:
        seconds: of the whole run, report and pictures included; ``None`` for no limit.
        now: a clock in seconds.
        began: when the run began by that clock; by default, now.
    """

    def __init__(
        self,
        seconds: float | None,
        now: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ) -> None:
        self.seconds, self._now = seconds, now
        self._began = now() if began is None else began

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self._now() - self._began

    @property
    def left_in_all(self) -> float:
        """Seconds until the run has to have ended."""
        return math.inf if self.seconds is None else max(self.seconds - self.spent, 0.0)

    @property
    def left(self) -> float:
        """Seconds for measuring: some are kept for the report and the pictures."""
        if self.seconds is None:
            return math.inf
        kept = min(FINISH_SECONDS, FINISH_SHARE * self.seconds)
        return max(self.left_in_all - kept, 0.0)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTime`` in the block after ``seconds``, which may be infinite."""
    if math.isinf(seconds):
        yield
        return
    with time_limit(seconds, OutOfTime):
        yield
