"""Which rank holds up the others: the conclusion from all heartbeat files."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import distributed

from dit_models.parallel.heartbeats import (
    ENDED,
    FAILED,
    Seen,
    describe_error,
    name_ranks,
    read_heartbeats,
)

HANG_STATUS = 75  # EX_TEMPFAIL of sysexits.h: "try again"
_SHOWN = 4
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "remote process exited",
    "NCCL communicator was aborted",
    "Socket Timeout",
)


class RankLost(RuntimeError):
    """Training cannot go on, because another rank of the group is gone; says which."""


@dataclass(frozen=True)
class Diagnosis:
    """What a rank that stands still has found out.

    Attributes:
        suspects: ranks that hold up the others; empty where that cannot be told.
        reporter: whether this rank is the one to print ``text``; the others print ``short``.
        text: who stands where, and why.
        short: one line of it.
    """

    suspects: tuple[int, ...]
    reporter: bool
    text: str
    short: str


def diagnose(seen: Sequence[Seen], rank: int, silence: float) -> Diagnosis | None:
    """Judge a group in which ``rank`` has stood longer than it may.

    Args:
        seen: all ranks, by rank.
        rank: who judges.
        silence: seconds without a heartbeat after which a process does not answer.

    Returns:
        The conclusion; ``None`` while some rank may still take its time, and none is lost.
    """
    lost = _lost(seen, silence)
    alive = _alive(seen, silence)
    if not lost and any(each.patient for each in alive if each.rank != rank):
        return None
    suspects = lost or [each for each in seen if each.beat is None] or _slowest(alive)
    suspects = suspects or [each for each in seen if not each.running]
    overdue = [each.rank for each in alive if each.rank == rank or _overdue(each)]
    reporter = min(overdue, default=rank)
    numbers = tuple(each.rank for each in suspects)
    me = next((each for each in alive if each.rank == rank), None)
    here = f"has stood in {me.place!r} for {me.stood:.0f} s" if me else "stands still"
    blamed = f"because of {name_ranks(numbers)}" if numbers else "for an unknown reason"
    if rank in numbers:
        blamed = "and holds up the others"
    short = (
        f"rank {rank} {here} {blamed}; it ends with status {HANG_STATUS}, "
        f"and rank {reporter} says more."
    )
    text = (
        f"{_explain(suspects, alive, silence)} The run ends here with status {HANG_STATUS}; "
        "torchrun starts it again from the last complete checkpoint while restarts are left "
        "(--max-restarts)."
    )
    return Diagnosis(numbers, reporter == rank, text, short)


def explain_failure(error: BaseException, folder: Path, rank: int, size: int) -> str:
    """Say which rank is missing, after a collective of this rank has failed.

    Waits up to four heartbeats for a rank to be silent, where nothing is known
    sooner: a process of another machine can only be missed.

    Args:
        error: what the collective raised.
        folder: the run's folder, as the ``Watchdog`` has it.
        rank: number of this process.
        size: number of processes.
    """
    if isinstance(error, RankLost):
        return str(error)
    began = time.monotonic()
    while True:
        seen = read_heartbeats(folder, rank, size)
        others = [each for each in seen if each.rank != rank]
        interval = max((each.beat.interval for each in others if each.beat), default=0.0)
        silence = max(1.0, 3 * interval)
        lost = _lost(others, silence)
        if lost or time.monotonic() - began > silence + interval:
            break
        time.sleep(max(0.05, interval / 2))
    alive = _alive(others, silence)
    standing = [each for each in alive if each.stood > silence]
    suspects = lost or [each for each in standing if each.beat and each.beat.outside]
    suspects = suspects or _slowest(standing) or [each for each in others if not each.running]
    return (
        f"{_explain(suspects, [] if lost else alive, silence)} Rank {rank} noticed it in "
        f"{seen[rank].place!r}: {describe_error(error)}."
    )


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether an exception, or its cause, says that a collective lost another rank."""
    while error is not None:
        known = isinstance(error, (distributed.DistNetworkError, distributed.DistBackendError))
        text = str(error)
        if isinstance(error, RankLost) or (
            isinstance(error, RuntimeError) and (known or any(part in text for part in _LOST_PEER))
        ):
            return True
        error = error.__cause__
    return False


def _lost(seen: Sequence[Seen], silence: float) -> list[Seen]:
    """Ranks that cannot go on; those first that failed for a reason of their own."""
    failed = [each for each in seen if each.beat and each.beat.state == FAILED]
    own_fault = [each for each in failed if each.beat and not each.beat.lost_peer]
    return own_fault or [each for each in seen if each.running and _silent(each, silence)]


def _silent(each: Seen, silence: float) -> bool:
    return each.age > silence or each.process_state() != ""


def _alive(seen: Sequence[Seen], silence: float) -> list[Seen]:
    return [each for each in seen if each.running and not _silent(each, silence)]


def _overdue(each: Seen) -> bool:
    """Whether it judges the group itself, now or within two heartbeats."""
    assert each.beat is not None
    if each.beat.limit is None:
        return False
    return each.stood + 2 * each.beat.interval >= each.beat.limit


def _slowest(alive: Sequence[Seen]) -> list[Seen]:
    """Those of running ranks that the others wait for: busy with something else, or behind."""
    busy = [each for each in alive if each.beat and each.beat.outside]
    some_busy = 0 < len(busy) < len(alive)
    candidates = busy if some_busy else list(alive)
    places = {each.place for each in candidates}
    if len(places) < 2:
        return busy if some_busy else []
    longest = max(candidates, key=lambda each: each.stood)
    return [each for each in candidates if each.place == longest.place]


def _explain(suspects: Sequence[Seen], alive: Sequence[Seen], silence: float) -> str:
    if not suspects:
        return (
            f"No rank can be told apart: {_places(alive)}. They may have called different "
            "collectives."
        )
    said = [_describe(each, silence) for each in suspects[:_SHOWN]]
    if len(suspects) > _SHOWN:
        said.append(f"so do {name_ranks([each.rank for each in suspects[_SHOWN:]])}")
    names = {each.rank for each in suspects}
    waiting = [each for each in alive if each.rank not in names]
    others = f" The others: {_places(waiting)}." if waiting else ""
    return f"{'; '.join(said)}.{others}"


def _describe(each: Seen, silence: float) -> str:
    beat = each.beat
    if beat is None:
        return (
            f"rank {each.rank} has no heartbeat file: it has not begun, or does not share the "
            "run's folder"
        )
    whose = f"(host {beat.host}, process {beat.process})"
    if beat.state == FAILED:
        return f"rank {each.rank} failed in {beat.where!r} {whose}: {beat.error}"
    if beat.state == ENDED:
        return f"rank {each.rank} has ended its work {whose}"
    state = each.process_state()
    if state == "gone":
        return f"rank {each.rank} is gone; it was last seen in {beat.where!r} {whose}"
    stopped = "is stopped" if state == "stopped" else "does not answer"
    if state == "stopped" or each.age > silence:
        return (
            f"the process of rank {each.rank} {stopped}; it was last seen in "
            f"{beat.where!r}, {each.age:.0f} s ago {whose}"
        )
    return (
        f"rank {each.rank} has stood in {beat.where!r} for {each.stood:.0f} s, at "
        f"{beat.line or 'an unknown line'} {whose}"
    )


def _places(ranks: Sequence[Seen]) -> str:
    """``ranks 0-1, 3 in 'step 14: forward'; rank 4 in ...``."""
    places: dict[str, list[int]] = {}
    for each in ranks:
        assert each.beat is not None
        places.setdefault(each.beat.where, []).append(each.rank)
    return "; ".join(f"{name_ranks(numbers)} in {where!r}" for where, numbers in places.items())
