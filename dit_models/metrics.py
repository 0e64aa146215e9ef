"""Metrics of a run: always ``metrics.jsonl``, and TensorBoard when it is installed."""

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """Append-only log; every line is flushed, so a killed run keeps what it wrote."""

    def __init__(self, run_dir: Path) -> None:
        self._stream = open(run_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._board = _tensorboard(run_dir)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one line; numbers also go to TensorBoard."""
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        self._stream.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None  # optional: metrics.jsonl holds the same numbers
    return SummaryWriter(str(run_dir / "tensorboard"))
