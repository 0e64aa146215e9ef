"""A limit on what a block of code may take: a provider that compiles and tunes itself, a step."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# The exception is lost where Python ignores it (in a finalizer), so it comes again.
AGAIN_SECONDS = 5.0


@contextmanager
def time_limit(seconds: float, error: type[BaseException] = TimeoutError) -> Iterator[None]:
    """Raise ``error`` in the block after ``seconds``; only in a main thread on Unix.

    Code of the block that waits inside a library is interrupted when that returns. A limit around
    this one holds on.
    """
    possible = hasattr(signal, "setitimer")
    if not possible or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise error(f"took longer than {seconds:.0f} s")

    before, began = signal.signal(signal.SIGALRM, stop), time.monotonic()
    outer, again = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            left = outer - (time.monotonic() - began)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), again)
