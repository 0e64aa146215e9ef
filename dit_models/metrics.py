"""Metrics of a run: always ``metrics.jsonl``, and TensorBoard when it is installed."""

import json
from pathlib import Path
from typing import Any

from dit_models.atomic import write_text

METRICS_NAME = "metrics.jsonl"


class MetricsLog:
    """Log of a run; every line is flushed, so a killed run keeps what it wrote.

    Args:
        run_dir: the run's folder.
        step: steps done. Lines of later steps, from before a crash, are dropped: they come again.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        path = run_dir / METRICS_NAME
        kept = [line for line in read_metrics(run_dir) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._board = _tensorboard(run_dir, step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one line; numbers, and lists of one number a layer, also go to TensorBoard."""
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()
        if self._board is None:
            return
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)
            elif isinstance(value[0], float):
                for layer, number in enumerate(value):
                    self._board.add_scalar(f"{name}/layer_{layer}", number, step)

    def close(self) -> None:
        """Close the files."""
        self._stream.close()
        if self._board is not None:
            self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that a kill cut short is left out."""
    path = run_dir / METRICS_NAME
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _tensorboard(run_dir: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None  # optional: metrics.jsonl holds the same numbers
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
