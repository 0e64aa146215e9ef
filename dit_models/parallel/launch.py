"""Whether this process was started as a rank of a group, and whether a restart can work."""

from collections.abc import Mapping

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SHARING_OFF = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_START = (
    "Start all ranks with torchrun: torchrun --nproc-per-node RANKS -m dit_models.train ... "
    "(docs/elastic.md has the lines for several machines and for restarts)."
)
_RESTARTABLE = (
    f"Start with {_SHARING_OFF}=1 torchrun --rdzv-backend c10d --rdzv-endpoint HOST:PORT "
    "--max-restarts N ... (HOST:PORT is localhost:0 on one machine)"
)


def world_size(environment: Mapping[str, str]) -> int:
    """Processes that were started for this run, by torchrun's variable ``WORLD_SIZE``.

    Raises:
        ValueError: it is no number of processes.
    """
    return _number(environment, "WORLD_SIZE", 1, default=1)


def check_launch(environment: Mapping[str, str], backend: str) -> list[str]:
    """Check what torchrun has set before the process group is made.

    Args:
        environment: the variables of this process (``os.environ``).
        backend: of the process group: ``gloo``, ``nccl`` or ``cpu:gloo,cuda:nccl``.

    Returns:
        Warnings, the same on every rank.

    Raises:
        ValueError: a variable is missing or makes no sense, or this is a restart that is bound to
            fail; says what to type.
    """
    missing = [name for name in _NEEDED if not environment.get(name)]
    if missing:
        raise ValueError(f"{', '.join(missing)} not set: this process is no rank. {_START}")
    size = world_size(environment)
    _number(environment, "RANK", 0, size - 1)
    _number(environment, "MASTER_PORT", 1, 65535)
    if "LOCAL_RANK" in environment:
        here = size
        if "LOCAL_WORLD_SIZE" in environment:
            here = _number(environment, "LOCAL_WORLD_SIZE", 1, size)
        _number(environment, "LOCAL_RANK", 0, here - 1)
    return _check_restarts(environment, backend)


def _check_restarts(environment: Mapping[str, str], backend: str) -> list[str]:
    restarts = _number(environment, "TORCHELASTIC_MAX_RESTARTS", 0, default=0)
    attempt = _number(environment, "TORCHELASTIC_RESTART_COUNT", 0, default=0)
    # What the workers' rendezvous goes by: whether their store is that of torchrun, which
    # outlives them and keeps the addresses of the dead attempt.
    if not restarts or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return []
    reason = "torchrun keeps the addresses of dead ranks in the store that it shares with them"
    if environment.get(_SHARING_OFF) == "1":
        reason += f" ({_SHARING_OFF}=1 has no effect on this rendezvous, only on c10d)"
    if attempt and "gloo" in backend:
        raise ValueError(
            f"restart {attempt} of {restarts} with {backend} cannot connect: {reason}. "
            f"{_RESTARTABLE}."
        )
    return [f"the {restarts} restarts asked for will fail: {reason}. {_RESTARTABLE}."]


def _number(
    environment: Mapping[str, str],
    name: str,
    least: int,
    most: int | None = None,
    default: int | None = None,
) -> int:
    given = environment.get(name, "" if default is None else str(default))
    expected = f"at least {least}" if most is None else f"from {least} to {most}"
    if not given.isascii() or not given.isdigit():
        raise ValueError(f"{name}={given!r}; expected a whole number {expected}. {_START}")
    if int(given) < least or (most is not None and int(given) > most):
        raise ValueError(f"{name}={given}; expected a number {expected}. {_START}")
    return int(given)
