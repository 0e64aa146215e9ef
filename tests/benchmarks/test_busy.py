"""Busy neighbours are there inside the block and gone after it, however it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.busy import busy
from benchmarks.environment import ROOT


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_neighbours_end_with_the_block():
    pids: list[int] = []

    def interrupted() -> None:
        with busy(2) as started:
            pids.extend(started)
            assert all(alive(pid) for pid in pids)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


def test_neighbours_end_when_the_measurement_is_killed():
    code = (
        "import time\nfrom benchmarks.busy import busy\n"
        "with busy(1) as pids:\n    print(pids[0], flush=True)\n    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.3)  # the neighbour has started
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(pid)
