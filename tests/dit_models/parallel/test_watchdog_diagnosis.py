"""What is concluded from heartbeat files, for each kind of trouble."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from dit_models.parallel.diagnosis import RankLost, diagnose, explain_failure, is_lost_peer
from dit_models.parallel.heartbeats import (
    Heartbeat,
    Seen,
    name_ranks,
    path_of,
    read_heartbeats,
    write_heartbeat,
)

SILENCE = 5.0


def seen(rank: int, where: str = "step 3: forward", stood: float = 12, **values: object) -> Seen:
    """A rank of another machine that has overstayed its limit, unless told otherwise."""
    age = values.pop("age", 0.0)
    beat = Heartbeat(rank, f"node{rank}", 100 + rank, where, stood, 10.0, 1.0)
    return Seen(rank, replace(beat, **values), age)  # type: ignore[arg-type]


def suspects(*ranks: Seen, judge: int = 0) -> tuple[int, ...]:
    diagnosis = diagnose(ranks, judge, SILENCE)
    assert diagnosis is not None
    return diagnosis.suspects


def test_a_silent_process_of_another_machine_is_named():
    ranks = [seen(0), seen(1, "step 3: data", 0, age=12), seen(2)]
    diagnosis = diagnose(ranks, 0, SILENCE)
    assert diagnosis is not None
    assert diagnosis.suspects == (1,)
    assert diagnosis.text.startswith(
        "the process of rank 1 does not answer; it was last seen in 'step 3: data', 12 s ago "
        "(host node1, process 101)"
    )
    assert "status 75" in diagnosis.text


def test_who_is_behind_is_named():
    assert suspects(seen(0), seen(1, "step 3: data", 12.5), seen(2)) == (1,)
    assert suspects(seen(0, "step 3: data", 12.5), seen(1), seen(2), judge=2) == (0,)


def test_who_works_where_the_others_wait_is_named_whatever_it_reported():
    assert suspects(seen(0), seen(1, outside=True, line="kernel.py:3 in f"), seen(2)) == (1,)
    # Its last collective keeps rank 0 behind; only rank 2 does something else.
    assert suspects(seen(0, "step 3: data", 12.5), seen(1), seen(2, outside=True)) == (2,)


def test_ranks_that_cannot_be_told_apart():
    diagnosis = diagnose([seen(rank) for rank in range(4)], 0, SILENCE)
    assert diagnosis is not None
    assert diagnosis.suspects == ()
    assert "No rank can be told apart: ranks 0-3 in 'step 3: forward'" in diagnosis.text
    assert suspects(*[seen(rank, outside=True) for rank in range(4)]) == ()


def test_a_rank_that_has_ended_or_never_begun_is_named():
    assert suspects(seen(0), seen(1, state="ended", age=20), seen(2)) == (1,)
    assert suspects(seen(0), Seen(1, None, 0.0), seen(2)) == (1,)


def test_a_failure_counts_more_than_those_that_it_caused():
    caused = seen(1, state="failed", error="RuntimeError: Connection closed", lost_peer=True)
    cause = seen(2, state="failed", error="OSError: no space left", age=20)
    assert suspects(seen(0), caused, cause) == (2,)
    assert suspects(seen(0), caused, seen(2)) == (1,)


def test_ranks_that_may_take_their_time_are_waited_for():
    assert diagnose([seen(0), seen(1, "evaluating", 99, limit=None)], 0, SILENCE) is None
    assert diagnose([seen(0), seen(1, "compiling", 99, limit=100.0)], 0, SILENCE) is None
    # But not once a rank is lost.
    assert suspects(seen(0), seen(1, limit=None), seen(2, age=12)) == (2,)


def test_the_lowest_rank_that_stands_still_reports_and_the_others_say_one_line():
    ranks = [seen(0, age=12), seen(1), seen(2), seen(3)]
    reports = [diagnose(ranks, judge, SILENCE) for judge in (1, 2, 3)]
    assert [report.reporter for report in reports if report] == [True, False, False]
    for report in reports:
        assert report is not None
        assert "because of rank 0" in report.short
        assert "rank 1 says more" in report.short
        assert "\n" not in report.short


def test_large_groups_are_listed_shortly():
    ranks = [seen(rank, age=12 if rank % 2 and rank < 20 else 0) for rank in range(256)]
    diagnosis = diagnose(ranks, 0, SILENCE)
    assert diagnosis is not None
    assert len(diagnosis.text) < 1200
    assert "so do ranks 9, 11, 13, 15, 17, 19" in diagnosis.text
    assert "20-255 in 'step 3: forward'" in diagnosis.text
    assert name_ranks([7]) == "rank 7"


@pytest.fixture
def own_file(tmp_path) -> Callable[..., None]:
    (tmp_path / ".ranks").mkdir()

    def write(rank: int, **values: object) -> None:
        beat = Heartbeat(rank, socket.gethostname(), os.getpid(), "step 3: data", 0.0, 10.0, 0.1)
        write_heartbeat(tmp_path, replace(beat, **values))  # type: ignore[arg-type]

    return write


def test_a_full_disk_does_not_silence_a_rank(tmp_path, own_file, monkeypatch):
    own_file(0)
    path = path_of(tmp_path, 0)
    os.utime(path, (1.0, 1.0))

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", full)
    own_file(0)
    assert time.time() - path.stat().st_mtime < 60
    assert os.listdir(path.parent) == [path.name]


def test_ages_are_by_the_clock_of_the_file_system(tmp_path, own_file):
    own_file(0)
    own_file(1, stood=3.0)
    now = path_of(tmp_path, 0).stat().st_mtime
    os.utime(path_of(tmp_path, 1), (now - 7, now - 7))
    ranks = read_heartbeats(tmp_path, 0, 3)
    assert 7 <= ranks[1].age < 60
    assert ranks[1].stood == ranks[1].age + 3
    assert ranks[2].beat is None


def test_a_damaged_heartbeat_is_no_heartbeat(tmp_path, own_file):
    own_file(0)
    for text in ("", "[1]", '{"rank": 1}'):
        path_of(tmp_path, 1).write_text(text)
        assert read_heartbeats(tmp_path, 0, 2)[1].beat is None


@pytest.fixture
def beating(own_file) -> Iterator[None]:
    """Rank 1 beats, and stands in its own code."""
    end = threading.Event()

    def beat() -> None:
        while not end.wait(0.1):
            own_file(1, stood=30.0, outside=True, line="loader.py:7 in fetch")

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    end.set()
    thread.join()


@pytest.mark.usefixtures("beating")
def test_a_time_out_is_explained_by_the_rank_that_still_stands(tmp_path, own_file):
    own_file(0)
    own_file(2, state="failed", error="RuntimeError: Timed out waiting", lost_peer=True)
    own_file(3, host="elsewhere")  # beats no more
    text = explain_failure(RuntimeError("Timed out waiting 30 ms"), tmp_path, 0, 3)
    assert text.startswith("rank 1 has stood in 'step 3: data' for 3")
    assert "loader.py:7 in fetch" in text
    assert "Rank 0 noticed it in 'step 3: data': RuntimeError: Timed out waiting 30 ms." in text
    text = explain_failure(RuntimeError("Connection closed by peer"), tmp_path, 0, 4)
    assert text.startswith("the process of rank 3 does not answer")


def test_a_rank_that_comes_late_hears_that_the_others_have_failed(tmp_path, own_file):
    own_file(0)
    own_file(1, state="failed", error="RuntimeError: Timed out waiting", lost_peer=True)
    text = explain_failure(RuntimeError("Connection closed by peer"), tmp_path, 0, 2)
    assert text.startswith("rank 1 failed in 'step 3: data'")
    assert "RuntimeError: Timed out waiting. Rank 0 noticed it" in text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/pair.cc:553] Connection closed by peer [::1]:22"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (RankLost("rank 1 is gone"), True),
        (RuntimeError("The size of tensor a (3) must match"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (OSError("Broken pipe"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_which_errors_mean_a_lost_rank(error, expected):
    assert is_lost_peer(error) is expected
    outer = ValueError("saving failed")
    outer.__cause__ = error
    assert is_lost_peer(outer) is expected
