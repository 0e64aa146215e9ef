"""Faults of one process of a whole training: the others say which, and the run goes on from a file.

Nothing is lost but the steps since the last checkpoint.
"""

import re
import shutil
import signal
from pathlib import Path

import pytest

from dit_models.checkpoints import verify_checkpoint
from dit_models.parallel.watchdog import HANG_STATUS

from . import disturbed_runs as runs


@pytest.fixture(scope="module")
def quiet_run(tmp_path_factory) -> Path:
    """A run of two processes that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    ends = runs.run(run_dir, 2)
    assert [end.value for end in ends] == [0, 0], ends[0].error
    return run_dir


@pytest.fixture(scope="module")
def undisturbed(quiet_run) -> list[float]:
    """Its losses."""
    return runs.losses(quiet_run)


def test_sigkill_in_the_middle_of_a_step(tmp_path, undisturbed):
    """``test_elastic.py`` goes on from there."""
    run_dir = tmp_path / "run"
    survivor, killed = runs.run(run_dir, 2, runs.kill)
    assert killed.exit_code == -signal.SIGKILL
    assert "RankLost: rank 1 is gone; it was last seen in 'step " in survivor.error
    assert "Rank 0 noticed it in 'step 5: backward'" in survivor.error
    assert runs.checkpoints(run_dir) == ["step_00000002", "step_00000004"]
    assert verify_checkpoint(run_dir / "checkpoints" / "step_00000004") == 4
    assert runs.losses(run_dir) == undisturbed[:4]


def test_sigkill_while_saving_leaves_the_checkpoint_before(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    survivor, killed = runs.run(run_dir, 2, runs.kill_in_the_next_save, step=4)
    assert killed.exit_code == -signal.SIGKILL
    assert survivor.error
    assert "rank 1 is gone" in survivor.error
    left = runs.checkpoints(run_dir)
    assert [name for name in left if name.startswith("step_")] == ["step_00000002"]
    ends = runs.run(run_dir, 2)
    assert [end.value for end in ends] == [0, 0], ends[0].error
    assert runs.losses(run_dir) == undisturbed
    assert runs.checkpoints(run_dir) == ["step_00000004", "step_00000006"]


@pytest.mark.parametrize(
    ("step", "saved"),
    [
        (4, ["step_00000002", "step_00000006"]),
        # The last step is saved twice: when its turn comes and, in the foreground, at the end.
        (6, ["step_00000004", "step_00000006"]),
    ],
)
def test_a_full_disk_costs_one_checkpoint(tmp_path, undisturbed, step, saved):
    run_dir = tmp_path / "run"
    ends = runs.run(run_dir, 2, runs.fill_the_disk_for_the_next_save, step=step)
    assert [end.value for end in ends] == [0, 0], ends[0].error
    said = (tmp_path / "stderr_0").read_text()
    assert "No space left on device" in said
    assert "Training goes on" in said
    assert runs.losses(run_dir) == undisturbed
    assert runs.checkpoints(run_dir) == saved


def test_a_damaged_shard_is_refused_by_its_name(tmp_path, quiet_run):
    run_dir = tmp_path / "run"
    shutil.copytree(quiet_run, run_dir)
    newest = run_dir / "checkpoints" / "step_00000006"
    shard = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    before = {path: path.read_bytes() for path in newest.iterdir()}
    for end in runs.run(run_dir, 2):
        assert f"CheckpointError: {shard} is damaged" in end.error
    assert {path: path.read_bytes() for path in newest.iterdir()} == before


@pytest.mark.parametrize("fault", [runs.hang, runs.freeze])
def test_a_process_that_hangs_is_named_and_ends_the_others(tmp_path, undisturbed, fault):
    run_dir = tmp_path / "run"
    ends = runs.run(run_dir, 2, fault, overrides=("parallel.timeout=3",))
    hung = HANG_STATUS if fault is runs.hang else -signal.SIGKILL
    assert [end.exit_code for end in ends] == [HANG_STATUS, hung]
    said = (tmp_path / "stderr_0").read_text()
    if fault is runs.hang:
        assert re.search(
            "rank 1 has stood in 'step 5: backward' for . s, at disturbed_runs.py", said
        )
    else:
        assert "the process of rank 1 is stopped; it was last seen in 'step 5: backward'" in said
    assert "The others: rank 0 in 'step 5: backward'" in said
    assert verify_checkpoint(run_dir / "checkpoints" / "step_00000004") == 4
    assert runs.losses(run_dir) == undisturbed[:4]


@pytest.mark.parametrize(
    ("fault", "ranks", "status"),
    [(runs.terminate, (1,), 128 + signal.SIGTERM), (runs.interrupt, (0, 1), 128 + signal.SIGINT)],
)
def test_a_signal_to_one_or_all_stops_all_at_the_same_saved_step(
    tmp_path, undisturbed, fault, ranks, status
):
    run_dir = tmp_path / "run"
    ends = runs.run(run_dir, 2, fault, step=3, ranks=ranks)
    assert [end.value for end in ends] == [status] * 2, ends[0].error
    assert runs.checkpoints(run_dir) == ["step_00000002", "step_00000003"]
    assert verify_checkpoint(run_dir / "checkpoints" / "step_00000003") == 3
    assert runs.losses(run_dir) == undisturbed[:3]


def test_restart_on_fewer_processes(tmp_path, undisturbed):
    """Four processes with experts on two of them, then two, then one; each before is killed."""
    divided = ("parallel.expert=2",)
    run_dir = tmp_path / "run"
    ends = runs.run(run_dir, 4, runs.kill, step=3, ranks=(3,), overrides=divided)
    assert all("RankLost: rank 3 is gone" in end.error for end in ends[:3])
    assert runs.checkpoints(run_dir) == ["step_00000002"]
    ends = runs.run(run_dir, 2, runs.kill, step=5, overrides=divided)
    assert "RankLost: rank 1 is gone" in ends[0].error
    assert runs.checkpoints(run_dir) == ["step_00000002", "step_00000004"]
    ends = runs.run(run_dir, 1)
    assert ends[0].value == 0, ends[0].error
    assert runs.losses(run_dir) == pytest.approx(undisturbed, rel=1e-5)
