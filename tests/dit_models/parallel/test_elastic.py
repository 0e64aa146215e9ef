"""Under the real torchrun a killed rank restarts the group, and nothing but time is lost."""

import os
import subprocess
import sys
from pathlib import Path

from ..training import TINY
from . import disturbed_runs as runs

ROOT = Path(__file__).resolve().parents[3]


def _torchrun(run_dir: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        "-m", "tests.dit_models.parallel.killed_once", *TINY, *runs.OVERRIDES, f"run_dir={run_dir}",
    ]  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, **dict(setting.split("=") for setting in settings)},
    )  # fmt: skip


def test_torchrun_restarts_the_group_and_the_losses_are_those_of_an_undisturbed_run(tmp_path):
    undisturbed, run_dir = tmp_path / "undisturbed" / "run", tmp_path / "run"
    undisturbed.parent.mkdir()
    ends = runs.run(undisturbed, 2)
    assert [end.value for end in ends] == [0, 0], ends[0].error
    done = _torchrun(run_dir, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Going on with {run_dir} at step 4." in done.stdout
    assert "error: rank 1 is gone; it was last seen in 'step " in done.stderr
    assert "Rank 0 noticed it in 'step 5: backward'" in done.stderr
    assert "restarts asked for will fail" not in done.stderr
    assert runs.losses(run_dir) == runs.losses(undisturbed)
    assert runs.checkpoints(run_dir) == ["step_00000004", "step_00000006"]
