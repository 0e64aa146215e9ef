"""A disk that is full for a while: training goes on, and says what it could not write."""

import errno
from pathlib import Path
from typing import Any

import pytest

import dit_models.run_checkpoints
from dit_models.checkpoints import list_checkpoints
from dit_models.metrics import MetricsLog, read_metrics
from dit_models.run_folder import checkpoint_folder
from dit_models.train import train

from .training import tiny_config


class FullDisk:
    """Calls ``work``, but for the calls with these numbers (from 0), where the disk is full."""

    def __init__(self, work: Any, *full: int) -> None:
        self.work, self.full, self.calls = work, full, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls - 1 in self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.work(*arguments)


def _patched(monkeypatch: pytest.MonkeyPatch, *full: int) -> None:
    save = dit_models.run_checkpoints.save_checkpoint
    monkeypatch.setattr("dit_models.run_checkpoints.save_checkpoint", FullDisk(save, *full))


def test_training_goes_on_where_a_save_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _patched(monkeypatch, 1)
    write = FullDisk(MetricsLog.write, 2)
    monkeypatch.setattr(MetricsLog, "write", lambda *arguments: write(*arguments))
    config = tiny_config(tmp_path, "steps=4", "save_every=1", "evaluation.enabled=false")
    assert train(config) == 0
    warned = capsys.readouterr().err
    assert "warning: step 2 could not be saved ([Errno 28] No space left" in warned
    assert "warning: the metrics of step 3 could not be written" in warned
    kept = [path.name for path in list_checkpoints(checkpoint_folder(tmp_path))]
    assert kept == ["step_00000003", "step_00000004"]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 4]


def test_a_last_step_that_cannot_be_saved_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _patched(monkeypatch, 1, 2)  # the last step's, and once more at the end
    with pytest.raises(OSError, match="No space left"):
        train(tiny_config(tmp_path, "steps=4", "save_every=2", "evaluation.enabled=false"))
    kept = [path.name for path in list_checkpoints(checkpoint_folder(tmp_path))]
    assert kept == ["step_00000002"]
