"""Busy neighbours: processes that spin beside a measurement."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# A neighbour also ends by itself when its parent is gone, however that happened.
_SPIN = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    sum(i * i for i in range(200_000))
"""


@contextmanager
def busy(count: int) -> Iterator[list[int]]:
    """Run ``count`` processes of plain arithmetic inside the block; their ids."""
    neighbours: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            # In a session of its own, so that Ctrl-C reaches only the measurement.
            neighbours.append(
                subprocess.Popen(
                    [sys.executable, "-c", _SPIN, str(os.getpid())], start_new_session=True
                )
            )
        yield [neighbour.pid for neighbour in neighbours]
    finally:
        for neighbour in neighbours:
            neighbour.kill()
        for neighbour in neighbours:
            neighbour.wait()
