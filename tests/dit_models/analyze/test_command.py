"""The command: from a trained run to a folder of figures, and what it refuses."""

import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dit_models import train
from dit_models.analyze import __main__ as command
from dit_models.analyze import report
from dit_models.analyze.collect import collect
from dit_models.analyze.figures import FIGURES
from dit_models.analyze.tables import equal_rows
from dit_models.config_io import build_config
from dit_models.drawing import Prompts
from dit_models.trainer import Trainer

from ..training import tiny_config
from .plans import Oracle, assert_same
from .stub import StubArtist, subjects

STEPS, EACH = 3, 2


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "ec"
    small = ("model_options.depth=4", "steps=2", "evaluation.enabled=false")
    assert train.train(tiny_config(folder, *small)) == 0
    return folder


@pytest.fixture
def one_figure(monkeypatch):
    """Drawing all of them takes seconds."""
    monkeypatch.setattr(report, "FIGURES", {"class_by_expert": FIGURES["class_by_expert"]})


@pytest.fixture(scope="module")
def analyzed(run_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis") / "out"
    assert analyze(run_dir, out) == 0
    return out


def analyze(run_dir, out, *more: str) -> int:
    arguments = ["--images-per-class", str(EACH), "--steps", str(STEPS), "--show", "2"]
    with pytest.raises(SystemExit) as stop:
        command.main([str(run_dir), "--out", str(out), *arguments, "--batch-size", "8", *more])
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    "recipe", ["digits", "digits-token-choice", "digits-expert-race", "digits-diffmoe"]
)
def test_counts_of_a_model_equal_the_oracle(recipe, tmp_path):
    """Plans of guided sampling, noted by a callback of our own and counted row by row."""
    trainer = Trainer(tiny_config(tmp_path, "model_options.depth=4", recipe=recipe), tmp_path)
    for _ in range(2):
        trainer.train_step()
    artist, classes = trainer.artist(), [3, 5, 3]
    config = artist.model.backbone.config
    layers = config.depth // config.moe_every
    oracle = Oracle(layers, 2, 2, tokens=64, experts=4)
    groups = [0, 1, 0]
    np.add.at(oracle.images_by_group, groups, 1)

    def note(step, timestep, x, output):
        assert len(output.sample) == 6  # guided: both halves
        for layer, plan in enumerate(output.plans):
            oracle.add(step, layer, plan, groups)

    prompts = Prompts(torch.tensor(classes), None)
    artist.draw(prompts, [9, 10, 11], callback=note)
    asked = subjects(0, ["3", "5"])
    asked = type(asked)(prompts, groups, asked.group_names, "class")
    analysis = collect(artist, asked, seed=9)
    assert_same(analysis.counts, oracle)
    assert equal_rows(analysis.counts) == (recipe == "digits")


def test_a_folder_with_everything(analyzed):
    expected = {f"{stem}.{kind}" for stem in FIGURES for kind in ("png", "npz")}
    assert {path.name for path in analyzed.iterdir()} == expected | {"index.html", "summary.json"}
    for stem in FIGURES:
        assert min(Image.open(analyzed / f"{stem}.png").size) > 150, stem
    summary = json.loads((analyzed / "summary.json").read_text())
    assert summary["complete"]
    assert (summary["images"], summary["moe_layers"], summary["experts"]) == (10 * EACH, 2, 4)
    assert summary["class_and_timestep_figures_show"] == "share of weight"
    # Expert choice with f_c = 2: two experts a token on average, whatever the router learnt.
    assert [layer["experts_per_token"] for layer in summary["layers"]] == [2.0, 2.0]


def test_arrays_agree_with_each_other(analyzed):
    tables = {stem: dict(np.load(analyzed / f"{stem}.npz")) for stem in FIGURES}
    rows = tables["load"]["rows"]
    assert rows.dtype == np.int64
    assert (rows == 10 * EACH * STEPS * 32).all()  # C = 64 · 2 / 4
    for stem, axes in (("class_by_expert", 1), ("position_by_expert", (1, 2))):
        np.testing.assert_array_equal(tables[stem]["rows"].sum(axes), rows)
    np.testing.assert_array_equal(tables["timestep_by_expert"]["rows"].sum(0), rows)
    histogram = tables["coverage"]["tokens_by_count"]
    assert (histogram.sum(-1) == 10 * EACH * 64).all()
    np.testing.assert_array_equal((histogram @ np.arange(5)).sum(0), rows.sum(1))
    pairs = tables["co_selection"]["pairs"]
    np.testing.assert_array_equal(np.diagonal(pairs, axis1=1, axis2=2), rows)
    shown = tables["experts_per_token"]
    assert shown["experts_per_token"].shape == (STEPS, 2, 2, 8, 8)
    assert (shown["experts_per_token"].sum((3, 4)) == 4 * 32).all()
    assert shown["titles"].tolist() == ["class 0", "class 1"]


def test_nothing_is_overwritten_unasked(run_dir, analyzed, tmp_path, capsys):
    before = (analyzed / "load.npz").read_bytes()
    assert analyze(run_dir, analyzed) == 2
    assert "holds an analysis; choose another --out, or add --overwrite" in capsys.readouterr().err
    assert (analyzed / "load.npz").read_bytes() == before
    (tmp_path / "thesis.txt").write_text("mine")
    assert analyze(run_dir, tmp_path, "--overwrite") == 2
    assert "holds other files (thesis.txt)" in capsys.readouterr().err
    assert analyze(run_dir, tmp_path / "thesis.txt") == 2
    assert "is a file" in capsys.readouterr().err


def test_overwriting_and_some_of_the_classes(run_dir, tmp_path, one_figure):
    out = tmp_path / "out"
    for labels in (["1"], ["4", "7"]):
        assert analyze(run_dir, out, "--overwrite", "--labels", *labels) == 0
        assert np.load(out / "class_by_expert.npz")["classes"].tolist() == labels
    assert json.loads((out / "summary.json").read_text())["images_by_class"] == {"4": 2, "7": 2}


def test_ctrl_c_writes_what_is_counted(run_dir, tmp_path, monkeypatch, capsys, one_figure):
    def interrupted(*arguments, progress, **options):
        calls = []

        def count(images):
            calls.append(images)
            if len(calls) == STEPS + 1:  # in the second batch
                signal.raise_signal(signal.SIGINT)

        return collect(*arguments, progress=count, **options)

    monkeypatch.setattr(command, "collect", interrupted)
    assert analyze(run_dir, tmp_path / "out") == 130
    assert "Stopped: the 8 images of whole batches are counted" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert not summary["complete"]
    assert summary["images"] == 8
    assert summary["images_by_class"]["9"] == 0  # drawn in turn: classes 0 to 7 came first


def test_without_a_vae_latents_are_shown_as_they_are(tmp_path, capsys):
    info = SimpleNamespace(vae=None)
    run = SimpleNamespace(info=info, config=SimpleNamespace(data=SimpleNamespace(vae="")))
    latents, pixels = (
        SimpleNamespace(decode=None, image_shape=(channels, 8, 8), device="cpu")
        for channels in (4, 3)
    )
    assert command.choose_decoder(run, pixels, None) is None
    assert capsys.readouterr().out == ""
    assert command.choose_decoder(run, latents, None) is None
    assert "no --vae is given" in capsys.readouterr().out
    with pytest.raises(ValueError, match="there is no VAE at"):
        command.choose_decoder(run, latents, str(tmp_path / "none"))


def test_a_dense_model_is_an_error_that_says_so(tmp_path, capsys):
    folder = tmp_path / "dense"
    small = ["model_options={depth: 1, hidden_size: 32, num_heads: 2}", f"run_dir={folder}"]
    small += ["steps=1", "batch_size=4", "evaluation.enabled=false", "sampling.num_steps=1"]
    assert train.train(build_config("digits-dense", overrides=small)) == 0
    assert analyze(folder, tmp_path / "out") == 2
    assert "this model is dense: it has no MoE layers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_figures_of_many_experts_long_names_and_empty_groups(tmp_path):
    """Names with what matplotlib reads as formulae; a group that was not drawn; top-1 of one."""
    asked = subjects(4, ["$x$ & <b> _^ " * 9, "two", "three", "four", "never drawn"])
    analysis = collect(StubArtist(router="token_choice"), asked)
    about = {"model": "stub", "data": "none", "training_step": 0, "steps": 4}
    report.write_report(tmp_path, analysis, {**about, "sampler": "euler", "guidance_scale": 1.0})
    share = np.load(tmp_path / "class_by_expert.npz")["rows_share"]
    assert np.isnan(share[:, 4]).all()
    np.testing.assert_allclose(share[:, :4].sum(-1), 1, rtol=1e-12)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["class_and_timestep_figures_show"] == "share of rows"
    assert summary["layers"][0]["unrouted_share"] == 0.0
