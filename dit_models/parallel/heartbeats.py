"""Heartbeat files: what every rank says of itself, and what another rank can tell from it.

They lie in ``run_dir/.ranks``, in the file system that the checkpoints need anyway, so that
reading them works when rank 0, its store or the network between the ranks is what stands still.
"""

import json
import os
import socket
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER_NAME = ".ranks"
_LONGEST_ERROR = 160
RUNNING, ENDED, FAILED = "running", "ended", "failed"


@dataclass(frozen=True)
class Heartbeat:
    """One rank's file.

    Attributes:
        rank, host, process: who writes it.
        where: what it last reported.
        stood: seconds it had been there when it wrote this.
        limit: seconds it may stand there; ``None`` while it is paused.
        interval: seconds between two writes.
        line: the innermost line of Python that its main thread was at; "" while it moves.
        outside: whether that line can not be one that waits for other ranks.
        state: running, ended (its work is done) or failed.
        error: the exception that ended it, where ``state`` is failed.
        lost_peer: whether that exception only says that another rank is gone.
    """

    rank: int
    host: str
    process: int
    where: str
    stood: float
    limit: float | None
    interval: float
    line: str = ""
    outside: bool = False
    state: str = RUNNING
    error: str = ""
    lost_peer: bool = False


@dataclass(frozen=True)
class Seen:
    """A rank as another one sees it.

    Attributes:
        rank: which.
        beat: its newest file; ``None`` when there is none that can be read.
        age: seconds since it was written, by the file system's clock.
    """

    rank: int
    beat: Heartbeat | None
    age: float

    @property
    def stood(self) -> float:
        """Seconds it has been where it is."""
        return self.age + self.beat.stood if self.beat else 0.0

    @property
    def place(self) -> str:
        """What it last reported."""
        return self.beat.where if self.beat else ""

    @property
    def running(self) -> bool:
        """Whether it was at work when it wrote its file."""
        return self.beat is not None and self.beat.state == RUNNING

    @property
    def patient(self) -> bool:
        """Whether it has a reason to stand where it is for longer."""
        assert self.beat is not None
        return self.beat.limit is None or self.stood < self.beat.limit

    def process_state(self) -> str:
        """``gone`` or ``stopped`` where this machine can tell, else ""."""
        if self.beat is None or self.beat.host != socket.gethostname():
            return ""
        try:
            os.kill(self.beat.process, 0)
        except ProcessLookupError:
            return "gone"
        except OSError:
            return ""
        with suppress(OSError, IndexError):  # only Linux has this file
            text = Path(f"/proc/{self.beat.process}/stat").read_text()
            letter = text.rpartition(")")[2].split()[0]
            return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(letter, "")
        return ""


def path_of(folder: Path, rank: int) -> Path:
    """A rank's file in a run's folder."""
    return folder / FOLDER_NAME / f"rank_{rank:05d}.json"


def write_heartbeat(folder: Path, beat: Heartbeat) -> None:
    """Replace a rank's file in one step; a full or failing disk must not end the training.

    It is not flushed to the disk: it matters only to processes that run now.
    """
    path = path_of(folder, beat.rank)
    temporary = path.with_suffix(f".{beat.process}.tmp")
    try:
        temporary.write_text(json.dumps(asdict(beat)))
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        with suppress(OSError):  # needs no space, and says that this process runs
            os.utime(path)


def read_heartbeats(folder: Path, rank: int, size: int) -> list[Seen]:
    """All ranks, by rank; read by ``rank``, whose file is touched to learn the time.

    So all ages are by one clock, that of the file system, however the machines' clocks differ.
    """
    home, own = folder / FOLDER_NAME, path_of(folder, rank)
    with suppress(OSError):
        os.listdir(home)  # a network file system then looks for the newest files
    now = 0.0
    with suppress(OSError):
        os.utime(own)
        now = own.stat().st_mtime
    return [_read(path_of(folder, other), other, now) for other in range(size)]


def _read(path: Path, rank: int, now: float) -> Seen:
    try:
        with open(path, encoding="utf-8") as stream:
            written = os.fstat(stream.fileno()).st_mtime
            beat = Heartbeat(**json.load(stream))
    except (OSError, ValueError, TypeError):
        return Seen(rank, None, 0.0)
    return Seen(rank, beat, max(0.0, now - written))


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    listed = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {listed}"


def describe_error(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, SystemExit):
        return f"exit status {error.code}"
    first = textwrap.shorten(str(error).strip().split("\n")[0], _LONGEST_ERROR)
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
