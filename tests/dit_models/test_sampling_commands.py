"""Drawing from a run: command line, independence of the batch, and the pictures."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dit_models import panels, train
from dit_models.config_io import build_config
from dit_models.drawing import Prompts
from dit_models.sample import main
from dit_models.trainer import Trainer

from .training import tiny_config


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    config = tiny_config(folder, "steps=2", "evaluation.enabled=false")
    assert train.train(config) == 0
    return folder


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_grid_has_the_asked_size_and_is_not_overwritten(run_dir, tmp_path, capsys):
    out = tmp_path / "grid.png"
    asked = (
        str(run_dir),
        "--out",
        str(out),
        "--labels",
        "3",
        "7",
        "--count",
        "4",
        "--columns",
        "2",
    )
    assert command(*asked) == 0
    picture = np.asarray(Image.open(out))
    assert picture.shape == (2 * 66 + 2, 2 * 66 + 2, 3)
    before = out.read_bytes()
    assert command(*asked) == 2
    assert "exists; choose another --out" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert command(*asked, "--overwrite", "--seed", "50") == 0
    assert out.read_bytes() != before


def test_routing_panels_on_request(run_dir, tmp_path):
    out = tmp_path / "grid.png"
    assert command(str(run_dir), "--out", str(out), "--count", "2", "--routing") == 0
    for name in ("grid_expert_load.png", "grid_experts_per_token.png"):
        assert Image.open(tmp_path / name).size[0] > 100


def test_a_panel_of_the_user_is_not_overwritten_either(run_dir, tmp_path, capsys):
    (tmp_path / "grid_expert_load.png").write_text("mine")
    assert command(str(run_dir), "--out", str(tmp_path / "grid.png"), "--routing") == 2
    assert "grid_expert_load.png exists; choose another --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["grid_expert_load.png"]
    assert (tmp_path / "grid_expert_load.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--labels", "10"), "--labels [10]: expected 0 to 9"),
        (("--captions", "a seven"), "this model reads labels"),
        (("--count", "0"), "--count 0"),
        (("--columns", "0"), "--columns 0"),
        (("--sampler", "ddim"), "ddim"),
        (("--device", "cuda:77"), "cuda:77"),
    ],
)
def test_wrong_words_are_one_line(run_dir, tmp_path, capsys, arguments, words):
    if words == "cuda:77" and torch.cuda.is_available():
        pytest.skip("has a GPU")
    assert command(str(run_dir), "--out", str(tmp_path / "x.png"), *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert command(str(tmp_path), "--out", str(tmp_path / "x.png")) == 2
    assert f"is {tmp_path} the folder of a run?" in capsys.readouterr().err


def test_an_image_is_the_same_alone_and_inside_a_batch(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, "sampling.num_steps=4"), tmp_path)
    for _ in range(3):
        trainer.train_step()
    artist = trainer.artist()
    labels = torch.tensor([1, 4, 9, 0, 3, 3, 7, 2])
    together = artist.draw(Prompts(labels, None), list(range(100, 108)), guidance_scale=2.0)
    for i in (0, 5):
        alone = artist.draw(Prompts(labels[i : i + 1], None), [100 + i], guidance_scale=2.0)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)
    assert not torch.allclose(together[4], together[5])  # same label, other seed


def test_prompts_and_seeds_must_match(tmp_path):
    artist = Trainer(tiny_config(tmp_path), tmp_path).artist()
    with pytest.raises(ValueError, match="2 prompts for 3 seeds"):
        artist.draw(Prompts(torch.tensor([1, 2]), None), [0, 1, 2])


def test_image_grid_places_every_image():
    images = torch.stack([torch.full((1, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    picture = panels.image_grid(images, columns=2, scale=1, gap=1)
    assert picture.shape == (7, 7, 3)
    assert picture[1, 1].tolist() == [0, 0, 0]
    assert picture[1, 4].tolist() == [128, 128, 128]
    assert picture[4, 1].tolist() == [255, 255, 255]
    assert picture[4, 4].tolist() == [64, 64, 64]  # no image there


def test_routing_record_counts_what_the_router_did(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, "sampling.num_steps=5"), tmp_path)
    prompts = Prompts(torch.tensor([0, 1, 2]), None)
    record = panels.record_routing(trainer.artist(), prompts, [1, 2, 3])
    assert record is not None
    levels, layers, count, rows, columns = record.experts_per_token.shape
    assert (levels, layers, count, rows, columns) == (3, 1, 3, 8, 8)
    assert record.noise_levels == [1.0, 0.6, 0.2]
    # Expert choice: every image spends E · C = 4 · 32 expert slots in every layer.
    assert torch.equal(record.experts_per_token.sum((3, 4)), torch.full((3, 1, 3), 128))
    torch.testing.assert_close(record.row_share, torch.full((1, 4), 0.25))
    torch.testing.assert_close(record.weight_share.sum(1), torch.ones(1))


def test_a_dense_model_has_no_routing_to_show(tmp_path):
    sizes = "model_options={depth: 1, hidden_size: 32, num_heads: 2}"
    config = build_config("digits-dense", overrides=[sizes, "sampling.num_steps=2"])
    artist = Trainer(config, tmp_path).artist()
    assert panels.record_routing(artist, Prompts(torch.tensor([1]), None), [0]) is None


COMMANDS = ("train", "sample", "evaluate", "models", "analyze", "convert", "export", "precompute",
            "ablation")  # fmt: skip


@pytest.mark.parametrize("module", COMMANDS)
def test_help_of_every_command(module):
    result = subprocess.run(
        [sys.executable, "-m", f"dit_models.{module}", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "usage: python -m" in result.stdout
