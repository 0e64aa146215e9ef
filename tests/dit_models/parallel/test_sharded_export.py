"""One process reads sharded checkpoints: to draw, to export, and through PyTorch's own reader."""

import resource
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dit_models.assemble import model_config_for
from dit_models.checkpoint_weights import stored_weights
from dit_models.checkpoints import CheckpointError
from dit_models.config_io import save_config
from dit_models.data import build_dataset
from dit_models.export import export, main
from dit_models.models import build_model
from dit_models.parallel import checkpoint_files
from dit_models.parallel.sharded_checkpoints import CheckpointWriter
from dit_models.run_folder import CONFIG_NAME, load_run, save_info
from tests.dit_models.evaluate.cases import save_run
from tests.dit_models.training import tiny_config
from tests.ranks import run_ranks

KINDS = ("expert choice", "captions")


def _divide(checkpoint, folder):
    """Save the averages of a checkpoint again, divided among the processes by rows."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    tensors = {}
    for name, stored in stored_weights(checkpoint, "ema").items():
        value = stored.read()
        divided = distribute_tensor(value, mesh, [Shard(0)]) if value.ndim else value
        tensors[f"ema.{name}"] = tensors[f"model.{name}"] = divided
    writer = CheckpointWriter(folder, keep=1)
    writer.save(1, tensors, {"step": 1})
    assert writer.wait() is not None
    return writer.failures()


@pytest.fixture(scope="module", params=KINDS)
def runs(request, tmp_path_factory):
    """A run of one process, and the same run with its checkpoint in three shards."""
    whole = save_run(tmp_path_factory.mktemp("runs") / "whole", request.param)
    (checkpoint,) = (whole / "checkpoints").iterdir()
    divided = shutil.copytree(whole, whole.with_name("divided"))
    shutil.rmtree(divided / "checkpoints")
    assert run_ranks(_divide, 3, checkpoint, divided / "checkpoints") == [[], [], []]
    return whole, divided


def differing(folder, other):
    """Files that are not equal byte by byte."""
    names = {path.name for path in folder.iterdir()} | {path.name for path in other.iterdir()}
    return [n for n in sorted(names) if (folder / n).read_bytes() != (other / n).read_bytes()]


def test_a_sharded_run_is_loaded_to_draw(runs):
    whole, divided = (load_run(run, "cpu") for run in runs)
    assert divided.step == 1
    expected = whole.artist.model.state_dict()
    found = divided.artist.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_export_of_a_sharded_run(runs, tmp_path, dtype):
    for run, name in zip(runs, ("a", "b"), strict=True):
        export(run, tmp_path / name, dtype=dtype)
    # The name of the folder is in the card.
    assert differing(tmp_path / "a", tmp_path / "b") == ["README.md"]
    averages = load_run(runs[0], "cpu").artist.model.backbone
    stored = load_file(tmp_path / "b" / "model.safetensors")
    asked = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for name, parameter in averages.named_parameters():
        assert torch.equal(stored[name], parameter.to(asked))


def test_files_of_the_size_asked_for(runs, tmp_path, capsys):
    for name, limit in (("many", "20000"), ("one", "0")):
        with pytest.raises(SystemExit) as stop:
            main([str(runs[1]), str(tmp_path / name), "--max-shard-bytes", limit])
        assert not stop.value.code
    assert (tmp_path / "one" / "model.safetensors").exists()
    parts = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(parts) > 2
    joined = {}
    for part in parts:
        tensors = load_file(part)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 20000
        joined |= tensors
    expected = load_file(tmp_path / "one" / "model.safetensors")
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[name], value) for name, value in expected.items())
    capsys.readouterr()
    for words, message in (
        (["--max-shard-bytes", "-1"], "--max-shard-bytes -1; expected 0 or more"),
        (["--max-shard-bytes", "9", "--pipeline"], "has no effect on --pipeline"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(runs[1]), str(tmp_path / "no"), *words])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_damaged_shard_is_not_exported(runs, tmp_path):
    run = shutil.copytree(runs[1], tmp_path / "run")
    shard = run / "checkpoints" / "step_00000001" / "rank_00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank_00002\.safetensors is damaged"):
        export(run, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"rank_00002\.safetensors is damaged"):
        load_run(run, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_of_another_model_are_refused(runs, tmp_path):
    run = shutil.copytree(runs[1], tmp_path / "run")
    config = run / CONFIG_NAME
    config.write_text(config.read_text().replace("hidden_size: 32", "hidden_size: 64"))
    for read in (lambda: export(run, tmp_path / "out"), lambda: load_run(run, "cpu")):
        with pytest.raises(CheckpointError, match=r"has shape \[.*\]; the model has \["):
            read()


def test_other_programs_read_it_with_pytorchs_reader(runs):
    checkpoint = runs[1] / "checkpoints" / "step_00000001"
    expected = {f"ema.{n}": v.read() for n, v in stored_weights(checkpoint, "ema").items()}
    found = {name: torch.full_like(value, 9) for name, value in expected.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        reader = dcp.HuggingFaceStorageReader(str(checkpoint))
        dcp.load(found, storage_reader=reader, no_dist=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def _save_zeros(run_dir, hidden_size):
    """A run of zeros, most of them in its experts."""
    config = tiny_config(
        run_dir, f"model_options.hidden_size={hidden_size}", "model_options.num_experts=16"
    )
    info = build_dataset(config.data.name, split=config.data.split).info
    run_dir.mkdir()
    save_config(config, run_dir / CONFIG_NAME)
    save_info(run_dir, info)
    model = build_model(model_config_for(config, info), device="meta")
    state = {
        f"ema.backbone.{name}": torch.zeros(value.shape, dtype=value.dtype)
        for name, value in model.state_dict().items()
    }
    writer = CheckpointWriter(run_dir / "checkpoints", keep=1)
    writer.save(1, state, {})
    writer.wait()
    return sum(value.nbytes for value in state.values())


def _growth_of_export(small, large, out):
    checkpoint_files.BLOCK_BYTES = 1 << 20
    export(small, out / "small")  # which loads the modules that it needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    export(large, out / "large", max_shard_bytes=0)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_the_export_takes_the_memory_of_a_few_blocks(tmp_path):
    small, large, out = (tmp_path / name for name in ("small", "large", "out"))
    run_ranks(_save_zeros, 1, small, 32)
    (size,) = run_ranks(_save_zeros, 1, large, 256)
    assert size > 40 << 20
    (growth,) = run_ranks(_growth_of_export, 1, small, large, out)
    assert (out / "large" / "model.safetensors").stat().st_size > size
    assert growth < size / 3
