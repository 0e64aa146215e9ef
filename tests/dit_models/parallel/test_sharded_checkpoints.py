"""Sharded checkpoints: saved by some processes, loaded by more or fewer, bit for bit."""

import pytest
import torch

from dit_models.checkpoints import save_checkpoint
from dit_models.parallel.sharded_checkpoints import (
    CheckpointWriter,
    is_sharded,
    load_sharded,
    load_single_process,
    newest_checkpoint,
    read_plain,
    verify_sharded,
)
from dit_models.rng import get_rng_state
from tests.dit_models.parallel.sharded_state import PLAIN, differing, trained, whole
from tests.ranks import run_ranks


def _save(folder, expert, replicate=1, experts=6):
    writer = CheckpointWriter(folder, keep=3)
    writer.save(7, trained(expert, replicate, experts).tensors(), PLAIN)
    saved = writer.wait()
    assert writer.failures() == []
    return str(saved)


def _load(folder, expert, replicate=1, experts=6):
    state = trained(expert, replicate, experts, seed=1)
    tensors = state.tensors()
    expected = trained(0, 1, experts).tensors()
    assert "model.dense.weight" in differing(whole(tensors), expected)
    checkpoint = newest_checkpoint(folder)
    step = verify_sharded(checkpoint)
    load_sharded(checkpoint, tensors)
    return step, differing(whole(tensors), expected), read_plain(checkpoint)


def _load_divided(folder, *owners):
    return [_load(folder, expert) for expert in owners]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saved by four processes, two owners of the experts."""
    folder = tmp_path_factory.mktemp("checkpoints")
    assert run_ranks(_save, 4, folder, 2) == [str(folder / "step_00000007")] * 4
    return folder


@pytest.mark.parametrize(("ranks", "owners"), [(4, [1]), (3, [3]), (2, [2, 1])])
def test_load_on_another_mesh(saved, ranks, owners):
    for outcomes in run_ranks(_load_divided, ranks, saved, *owners):
        assert outcomes == [(7, [], PLAIN)] * len(owners)


def test_load_of_copies(tmp_path):
    run_ranks(_save, 4, tmp_path, 2, 2)
    assert _load(tmp_path, 0) == (7, [], PLAIN)


def test_load_on_more_owners(tmp_path):
    run_ranks(_save, 2, tmp_path, 1, 1, 12)
    for outcome in run_ranks(_load, 4, tmp_path, 4, 1, 12):
        assert outcome == (7, [], PLAIN)


def test_load_in_one_process_without_a_group(saved):
    assert _load(saved, 0) == (7, [], PLAIN)


def _load_single(checkpoint, expert):
    state = trained(expert, seed=1)
    tensors = state.tensors()
    names = [name for name, _ in state.model.named_parameters()]
    verify_sharded(checkpoint)
    plain = load_single_process(checkpoint, tensors, names)
    return differing(whole(tensors), trained(0).tensors()), plain


def test_load_the_checkpoint_of_one_process(tmp_path):
    state = trained(0)
    training = PLAIN | {
        "optimizer": state.optimizer.state_dict(),
        "rng": get_rng_state(torch.Generator().manual_seed(5)),
    }
    saved = save_checkpoint(tmp_path, 7, state.model, state.model, training, keep=1)
    assert not is_sharded(saved)
    for outcome in run_ranks(_load_single, 2, saved, 2):
        assert outcome == ([], PLAIN)
