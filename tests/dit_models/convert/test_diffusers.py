"""diffusers' DiTTransformer2DModel: the same function, the same bits back."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from dit_models.convert import Choices, convert, restore
from dit_models.convert.__main__ import main
from dit_models.pretrained import load_pretrained
from moe_kernels.testing import assert_as_accurate

from .sources import DENSE, inputs, same_bits, state_of

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")

EMBEDDERS = (".timestep_embedder.", ".class_embedder.")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder that diffusers saved: random weights, one embedder for all blocks."""
    folder = tmp_path_factory.mktemp("diffusers") / "transformer"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=5,
            norm_eps=1e-6,
        )
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
    model.save_pretrained(folder)
    return folder


def test_the_same_function(source, tmp_path):
    done = convert(source, tmp_path / "ours")
    assert done.format == "diffusers"
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(source).eval()
    ours = load_pretrained(tmp_path / "ours").backbone
    for max_timestep in (1.0, 999.0):
        latents, timesteps, labels = inputs(done.model, max_timestep)
        with torch.no_grad():
            actual = ours(latents, timesteps, labels).sample
            plain = theirs.float()(latents, timesteps, labels).sample
            exact = theirs.double()(latents.double(), timesteps.double(), labels).sample
        # diffusers computes its sinusoids in fp32 in every dtype, as we do.
        assert_as_accurate(actual, plain, exact)


def test_frequencies_of_dit_on_request(source, tmp_path):
    as_diffusers = convert(source, tmp_path / "one").model
    as_dit = convert(source, tmp_path / "two", choices=Choices(time_frequency_shift=0)).model
    assert (as_diffusers.time_frequency_shift, as_dit.time_frequency_shift) == (1, 0)
    with pytest.raises(ValueError, match="time_frequency_shift=2: expected 0 or 1"):
        replace(as_dit, time_frequency_shift=2)
    latents, timesteps, labels = inputs(as_dit, 999.0)
    with torch.no_grad():
        one, two = (
            load_pretrained(tmp_path / name).backbone(latents, timesteps, labels).sample
            for name in ("one", "two")
        )
    assert not torch.allclose(one, two)


def test_back_bit_for_bit(source, tmp_path):
    convert(source, tmp_path / "ours")
    restore(tmp_path / "ours", tmp_path / "back")
    name = "diffusion_pytorch_model.safetensors"
    same_bits(safetensors.load_file(tmp_path / "back" / name), safetensors.load_file(source / name))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "back")


def test_embedders_that_differ_are_refused(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    path = tmp_path / "source" / "diffusion_pytorch_model.safetensors"
    state = safetensors.load_file(path)
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"][3] += 1e-3
    safetensors.save_file(state, path)
    with pytest.raises(ValueError, match=r"here they differ.*1\.norm1\.emb\.timestep_embedder"):
        convert(tmp_path / "source", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_file_alone_is_not_enough(source, tmp_path):
    path = source / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"needs its config\.json; give the folder"):
        convert(path, tmp_path / "ours")


def test_a_whole_pipeline_folder_and_its_norm_eps(source, tmp_path):
    shutil.copytree(source, tmp_path / "pipeline" / "transformer")
    config_path = tmp_path / "pipeline" / "transformer" / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(config | {"norm_eps": 1e-5}))
    done = convert(tmp_path / "pipeline", tmp_path / "ours")
    assert any("adds 1e-05, ours 1e-06" in note for note in done.notes)


def test_dit_of_facebook_is_not_written_for_diffusers_whose_function_differs(tmp_path):
    torch.save(state_of(DENSE), tmp_path / "dit.pt")
    convert(tmp_path / "dit.pt", tmp_path / "ours", choices=Choices(num_heads=4))
    with pytest.raises(ValueError, match=r"time_frequency_shift=0 \(it has 1\)"):
        restore(tmp_path / "ours", tmp_path / "back", to="diffusers")


def command(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_command_line(source, tmp_path, capsys):
    labels = tmp_path / "labels.txt"
    labels.write_text("zero\none\ntwo\nthree\nfour\n")
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert command(source, ours, "--labels", labels, "--objective", "flow") == 0
    text = capsys.readouterr().out
    for words in (
        "found      a DiTTransformer2DModel of diffusers",
        "size       no preset: 2 blocks of width 32, 4 heads",
        "latents    4 x 8 x 8, 8 output channels, 5 classes",
        "objective  flow",
    ):
        assert words in text
    assert json.loads((ours / "config.json").read_text())["id2label"]["3"] == "three"
    assert command("--back", ours, back) == 0
    assert "a DiTTransformer2DModel" in capsys.readouterr().out
    for arguments, words in (
        ((source, ours), "ours exists"),
        ((source, tmp_path / "x", "--to", "dit"), "--to dit goes with --back"),
        (("--back", ours, tmp_path / "x", "--num-heads", "4"), "--num-heads does not go with"),
        ((source, tmp_path / "x", "--num-heads", "8"), "says 4"),
        ((source, tmp_path / "x", "--top-k", "2"), "has no experts"),
        ((source, tmp_path / "x", "--weights", "ema"), "no .pt container"),
        ((source, tmp_path / "x", "--labels", tmp_path / "none"), "cannot be read"),
    ):
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
    labels.write_text("zero\n")
    assert command(source, tmp_path / "x", "--labels", labels) == 2
    assert "1 class names for 5 classes" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
