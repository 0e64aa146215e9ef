"""Saves that fail or are cut off, and checkpoints that were damaged: nothing is lost."""

import errno
import json
import os
import resource
import shutil
import signal
import time
import warnings

import pytest
import torch
from torch import distributed
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dit_models.checkpoints import CheckpointError, list_checkpoints
from dit_models.parallel import sharded_checkpoints
from dit_models.parallel.checkpoint_storage import CheckpointStorageWriter
from dit_models.parallel.sharded_checkpoints import (
    CheckpointWriter,
    load_sharded,
    newest_checkpoint,
    verify_sharded,
)
from tests.dit_models.parallel.sharded_state import PLAIN, differing, trained
from tests.ranks import run_outcomes, run_ranks


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def differences(checkpoint):
    """What of a checkpoint is not the state that ``trained`` gives."""
    tensors = trained(0, seed=1).tensors()
    verify_sharded(checkpoint)
    load_sharded(checkpoint, tensors)
    return differing(tensors, trained(0).tensors())


def _killed_while_saving(folder, method, rank):
    writer = CheckpointWriter(folder, keep=3)
    tensors = trained(2).tensors()
    writer.save(3, tensors, PLAIN)
    assert writer.wait() == folder / "step_00000003"
    original = getattr(CheckpointStorageWriter, method)

    def die(self, *arguments, **options):
        if distributed.get_rank() == rank:
            (self.temporary / "rank_00009.safetensors").write_bytes(b"half of a sh")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments, **options)

    setattr(CheckpointStorageWriter, method, die)
    writer.save(4, tensors, PLAIN)
    newest = writer.wait()
    return newest.name, writer.failures()


@pytest.mark.parametrize(("method", "rank"), [("_write_shard", 1), ("finish", 0)])
def test_a_process_killed_while_saving(tmp_path, method, rank):
    outcomes = run_outcomes(_killed_while_saving, 2, tmp_path, method, rank)
    assert outcomes[rank].exit_code == -signal.SIGKILL
    newest, failures = outcomes[1 - rank].value
    assert newest == "step_00000003"
    assert len(failures) == 1
    assert "step_00000004 was not saved" in failures[0]
    if rank == 0:  # nobody was left to clear up
        assert ".writing-step_00000004" in contents(tmp_path)
    assert newest_checkpoint(tmp_path) == tmp_path / "step_00000003"
    assert contents(tmp_path) == ["step_00000003"]
    assert differences(tmp_path / "step_00000003") == []


def _disk_full(folder, full_rank):
    writer = CheckpointWriter(folder, keep=3)
    tensors = trained(2).tensors()
    writer.save(3, tensors, PLAIN)
    writer.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.get_rank() == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    writer.save(4, tensors, PLAIN)
    kept, failures, left = writer.wait(), writer.failures(), contents(folder)
    distributed.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.save(5, tensors, PLAIN)
    return kept.name, failures, left, writer.wait().name, writer.failures()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_costs_one_checkpoint(tmp_path, rank):
    for outcome in run_ranks(_disk_full, 2, tmp_path, rank):
        kept, failures, left, newest, more_failures = outcome
        assert kept == "step_00000003"
        assert len(failures) == 1
        assert f"step_00000004 was not saved: rank {rank}: OSError" in failures[0]
        assert os.strerror(errno.EFBIG) in failures[0]
        assert left == ["step_00000003"]
        assert (newest, more_failures) == ("step_00000005", [])
    assert differences(tmp_path / "step_00000005") == []


def _saved_while_training(folder):
    state = trained(2)
    tensors = state.tensors()
    original = CheckpointStorageWriter.write_data

    def slow(self, *arguments):
        time.sleep(0.2)
        return original(self, *arguments)

    CheckpointStorageWriter.write_data = slow
    writer = CheckpointWriter(folder, keep=2)
    for step in (3, 4, 5):
        writer.save(step, tensors, PLAIN)
    with torch.no_grad():
        for value in tensors.values():
            value.zero_()
    # This step exists; what is wrong now is not written over it.
    writer.save(5, tensors, PLAIN)
    writer.close()
    return writer.failures()


def test_the_state_at_the_call_is_saved_while_training_goes_on(tmp_path):
    assert run_ranks(_saved_while_training, 2, tmp_path) == [[], []]
    assert contents(tmp_path) == ["step_00000004", "step_00000005"]
    for checkpoint in list_checkpoints(tmp_path):
        assert differences(checkpoint) == []


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    run_ranks(_save, 2, folder)
    return folder / "step_00000007"


def _save(folder):
    writer = CheckpointWriter(folder, keep=1)
    writer.save(7, trained(2).tensors(), PLAIN)
    writer.close()


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(data)


DAMAGES = [
    (cut, "rank_00001.safetensors", "is damaged"),
    (flip, "rank_00001.safetensors", "is damaged"),
    (os.unlink, "rank_00000.safetensors", "is missing"),
    (flip, "index.json", "is damaged"),
    (os.unlink, "plain.json", "is missing"),
    (cut, "manifest.json", "is missing or damaged"),
    (os.unlink, "manifest.json", "is missing or damaged"),
]


def _verify(checkpoints):
    messages = []
    for checkpoint in checkpoints:
        try:
            messages.append(verify_sharded(checkpoint))
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def test_damaged_files_are_named_in_every_process(good, tmp_path):
    copies = [good]
    for number, (damage, name, _) in enumerate(DAMAGES):
        copies.append(shutil.copytree(good, tmp_path / str(number) / good.name))
        damage(copies[-1] / name)
    first, second = run_ranks(_verify, 2, copies)
    assert first == second
    assert first[0] == 7
    for message, (_, name, words) in zip(first[1:], DAMAGES, strict=True):
        assert name in message
        assert words in message
        assert "Nothing was changed" in message


def test_a_checkpoint_under_the_name_of_another_step_is_refused(good, tmp_path):
    copy = shutil.copytree(good, tmp_path / "step_00000009")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged \(step 7"):
        verify_sharded(copy)


def _load_damaged(checkpoint):
    tensors = trained(2, seed=1).tensors()
    try:
        load_sharded(checkpoint, tensors)
    except CheckpointError as error:
        return str(error)


def test_reading_past_the_end_of_a_file_fails_in_every_process(good, tmp_path):
    copy = shutil.copytree(good, tmp_path / good.name)
    (copy / "rank_00001.safetensors").write_bytes(b"")
    first, second = run_ranks(_load_damaged, 2, copy)
    assert first == second
    assert "rank_00001.safetensors ends" in first


def change_file(index):
    index["tensors"]["model.counts"]["chunks"][0]["file"] = "../../secret.safetensors"


def change_unlisted(index):
    index["tensors"]["model.counts"]["chunks"][0]["file"] = "rank_00007.safetensors"


def change_offset(index):
    index["tensors"]["model.counts"]["chunks"][0]["offsets"] = [3]


def change_start(index):
    index["tensors"]["model.counts"]["chunks"][0]["start"] = -8


def drop_chunk(index):
    del index["tensors"]["model.dense.weight"]["chunks"][0]


def change_dtype(index):
    index["tensors"]["model.counts"]["dtype"] = "os.system"


@pytest.mark.parametrize(
    "change",
    [change_file, change_unlisted, change_offset, change_start, drop_chunk, change_dtype],
)
def test_a_forged_index_is_refused(good, tmp_path, change):
    """Its hash alone would not tell: who forges the one can forge the other."""
    copy = shutil.copytree(good, tmp_path / good.name)
    index = json.loads((copy / "index.json").read_text())
    change(index)
    (copy / "index.json").write_text(json.dumps(index))
    tensors = trained(0, seed=1).tensors()
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load_sharded(copy, tensors)
    assert differing(tensors, trained(0, seed=1).tensors()) == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.other", torch.zeros(2), r"lacks 1 tensors of the model: model\.other"),
        ("model.scale", torch.zeros(2), r"model\.scale is \[\] of torch\.float32"),
        ("model.scale", torch.zeros(()).double(), r"has \[\] of torch\.float64"),
    ],
)
def test_a_model_that_does_not_fit(good, name, value, words):
    with pytest.raises(CheckpointError, match=words):
        load_sharded(good, {name: value})


def test_a_dtype_without_a_name_is_refused_before_anything_is_written(tmp_path):
    writer = sharded_checkpoints.CheckpointWriter(tmp_path, keep=1)
    with pytest.raises(ValueError, match=r"z is of torch\.complex64"):
        writer.save(1, {"z": torch.zeros(2, dtype=torch.complex64)}, {})
    assert contents(tmp_path) == []


def test_no_file_of_a_checkpoint_is_a_pickle(good):
    assert {path.suffix for path in good.iterdir()} == {".json", ".safetensors"}


def _save_to_own_disks(folder):
    own = folder / str(distributed.get_rank())
    own.mkdir()
    writer = CheckpointWriter(own, keep=1)
    writer.save(7, trained(2).tensors(), PLAIN)
    return writer.wait(), writer.failures(), contents(own)


def test_machines_without_a_shared_folder_are_told(tmp_path):
    first, second = run_ranks(_save_to_own_disks, 2, tmp_path)
    for saved, (reason,), left in (first, second):
        assert saved is None
        assert left == []
        assert "rank 1: FileNotFoundError" in reason
        assert "need a folder that all of them see" in reason


def part_of(shape, offsets, sizes):
    """What PyTorch plans to write of a tensor."""
    data = TensorWriteData(
        ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
        TensorProperties(torch.float32),
        torch.Size(shape),
    )
    return WriteItem(MetadataIndex("x", offsets), WriteItemType.SHARD, tensor_data=data)


def test_empty_parts_are_not_taken_for_copies(tmp_path):
    """Of parts at one offset PyTorch keeps one, so an empty part could replace a full one."""
    empty, full, all_there_is = (
        part_of((4, 2), (2, 0), (0, 2)),
        part_of((4, 2), (2, 0), (2, 2)),
        part_of((0, 2), (0, 0), (0, 2)),
    )
    writer = CheckpointStorageWriter(tmp_path / "step_00000001", 1, {}, {})
    plan = writer.prepare_local_plan(SavePlan([empty, full, all_there_is]))
    assert plan.items == [full, all_there_is]


def _save_unequal(folder):
    tensors = trained(2).tensors()
    tensors["model.scale"] = torch.tensor(float(distributed.get_rank()))
    writer = CheckpointWriter(folder, keep=1)
    writer.save(7, tensors, PLAIN)
    with warnings.catch_warnings(record=True) as caught:
        writer.wait()
    return [str(warning.message) for warning in caught], writer.failures()


def test_a_tensor_that_differs_between_processes_is_named(tmp_path):
    first, second = run_ranks(_save_unequal, 2, tmp_path)
    assert second == ([], [])
    assert first[1] == []
    assert len(first[0]) == 1
    assert "holds the first process's values of model.scale, which differ" in first[0][0]
    loaded = {"model.scale": torch.tensor(5.0)}
    load_sharded(tmp_path / "step_00000007", loaded)
    assert loaded["model.scale"] == 0
