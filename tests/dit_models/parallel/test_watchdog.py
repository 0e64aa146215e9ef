"""The watchdog on a small loop of three processes: who holds up the others is named."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from dit_models.parallel.heartbeats import FOLDER_NAME, read_heartbeats
from dit_models.parallel.watchdog import HANG_STATUS, Watchdog

from ...ranks import Outcome, run_outcomes, run_ranks

TIMEOUT = 2.0
LAST = 5


def _signal_later(first: str, seconds: float, second: str) -> None:
    """This process gets one signal now and another one after a while."""
    own = os.getpid()
    command = f"kill -{first} {own}; sleep {seconds}; kill -{second} {own}"
    subprocess.Popen(["sh", "-c", command])
    time.sleep(0.5)


def _disturb(kind: str, rank: int, watchdog: Watchdog) -> None:
    if kind == "suspend":
        _signal_later("STOP", 2 * TIMEOUT, "CONT")
    if rank != 1:
        return
    if kind in ("stop", "kill"):
        time.sleep(2 * TIMEOUT / 10)  # long enough for a heartbeat that says where
    if kind == "sleep":
        time.sleep(60)
    elif kind == "stop":
        _signal_later("STOP", TIMEOUT + 2, "KILL")
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "raise":
        raise OSError("no space left")
    elif kind == "pause":
        with watchdog.paused():
            time.sleep(2 * TIMEOUT)
        time.sleep(TIMEOUT / 3)  # the pause counts no longer
    elif kind == "new place":
        watchdog.report("compiling")
        time.sleep(2 * TIMEOUT)


def loop(folder: Path, kind: str) -> int:
    """Steps with a collective each, the fourth of them disturbed; what it says goes to a file."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    os.dup2(os.open(folder / f"stderr_{rank}", os.O_WRONLY | os.O_CREAT), 2)
    step = 0
    with Watchdog(folder, rank, size, TIMEOUT) as watchdog:
        for step in range(LAST + 1):
            watchdog.report(f"step {step}: data")
            if step == 3:
                _disturb(kind, rank, watchdog)
            watchdog.report(f"step {step}: forward")
            distributed.all_reduce(torch.ones(3))
    return step


def _said(folder: Path) -> list[str]:
    return [(folder / f"stderr_{rank}").read_text() for rank in range(3)]


def _outcomes(folder: Path, kind: str) -> list[Outcome]:
    return run_outcomes(loop, 3, folder, kind)


def test_a_rank_that_hangs_in_python_is_named_with_its_line(tmp_path):
    ends = _outcomes(tmp_path, "sleep")
    assert [end.exit_code for end in ends] == [HANG_STATUS] * 3
    first, guilty, last = _said(tmp_path)
    assert "watchdog: rank 1 has stood in 'step 3: data' for" in first
    assert "test_watchdog.py:" in first
    assert "in _disturb" in first
    assert "The others: ranks 0, 2 in 'step 3: forward'." in first
    assert "Python stack" not in first  # it waits, as its place says
    assert "rank 1 has stood in 'step 3: data'" in guilty
    assert "holds up the others" in guilty
    assert "Python stack of its threads" in guilty
    assert "in _disturb" in guilty
    assert last.startswith("\nwatchdog: rank 2 has stood in 'step 3: forward'")
    assert "because of rank 1" in last
    assert last.strip().count("\n") == 0


def test_a_stopped_rank_is_named(tmp_path):
    ends = _outcomes(tmp_path, "stop")
    assert [end.exit_code for end in ends] == [HANG_STATUS, -signal.SIGKILL, HANG_STATUS]
    first, guilty, last = _said(tmp_path)
    assert "the process of rank 1 is stopped; it was last seen in 'step 3: data'" in first
    assert "The others: ranks 0, 2 in 'step 3: forward'." in first
    assert guilty == ""
    assert "because of rank 1" in last
    assert last.strip().count("\n") == 0


def test_a_killed_rank_is_named_by_the_others(tmp_path):
    ends = _outcomes(tmp_path, "kill")
    assert ends[1].exit_code == -signal.SIGKILL
    for rank in (0, 2):
        assert "RankLost: rank 1 is gone; it was last seen in 'step 3: data'" in ends[rank].error
        assert f"Rank {rank} noticed it in 'step 3: forward': RuntimeError" in ends[rank].error
    assert _said(tmp_path) == ["", "", ""]


def test_the_reason_of_a_rank_that_failed_reaches_the_others(tmp_path):
    ends = _outcomes(tmp_path, "raise")
    assert ends[1].error.endswith("OSError: no space left\n")
    for rank in (0, 2):
        assert "RankLost: rank 1 failed in 'step 3: data'" in ends[rank].error
        assert "OSError: no space left. Rank" in ends[rank].error


@pytest.mark.parametrize("kind", ["none", "pause", "new place", "suspend"])
def test_what_may_take_long_ends_nothing(tmp_path, kind):
    assert run_ranks(loop, 3, tmp_path, kind) == [LAST] * 3
    assert _said(tmp_path) == ["", "", ""]
    seen = read_heartbeats(tmp_path, 0, 3)
    assert [(each.beat.state, each.place) for each in seen if each.beat] == [
        ("ended", f"step {LAST}: forward")
    ] * 3


def _orphan(folder: Path) -> None:
    """A process with a watchdog, whose parent ends; it writes down the signal that it gets."""
    if os.fork():
        _wait_for(folder / "watching")  # or the child would take what adopts it for its torchrun
        return
    os.environ["TORCHELASTIC_RUN_ID"] = "run"

    def note(number: int, frame: object) -> None:
        (folder / "signal").write_text(str(number))
        os._exit(0)

    signal.signal(signal.SIGTERM, note)
    with Watchdog(folder, 0, 1, 1.0):
        (folder / "watching").touch()
        time.sleep(20)
    os._exit(1)


def _wait_for(path: Path) -> None:
    for _ in range(100):
        if path.exists():
            break
        time.sleep(0.1)


def test_a_process_whose_torchrun_has_died_is_told_to_stop(tmp_path):
    run_ranks(_orphan, 1, tmp_path)
    _wait_for(tmp_path / "signal")
    time.sleep(0.1)
    assert (tmp_path / "signal").read_text() == str(int(signal.SIGTERM))


def test_without_a_timeout_nothing_is_watched(tmp_path):
    with Watchdog(tmp_path, 0, 2, 0) as watchdog:
        watchdog.report("step 1: data")
        with watchdog.paused():
            assert not (tmp_path / FOLDER_NAME).exists()
    assert not (tmp_path / FOLDER_NAME).exists()


def test_a_negative_timeout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="timeout=-1; expected seconds above 0"):
        Watchdog(tmp_path, 0, 2, -1)
