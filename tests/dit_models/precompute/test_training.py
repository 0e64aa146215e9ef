"""Training on precomputed folders: exact resume, stored text, decoding, no VAE at hand."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_models import train
from dit_models.data import BatchLoader, LatentDataset
from dit_models.drawing import Prompts
from dit_models.precompute.run import precompute
from dit_models.run_folder import load_run
from dit_models.trainer import Trainer
from dit_models.vae import VAE

from ..tiny_models import DIM, save_t5, save_vae
from ..training import tiny_config
from .helpers import CAPTIONS, captioned, classes, settings


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two folders of latents (classes, and captions with text), and what they were made with."""
    root = tmp_path_factory.mktemp("latents")
    save_t5(root / "t5")
    save_vae(root / "vae")
    common = {"image_size": 16, "vae": str(root / "vae"), "flip": True}
    precompute(settings(classes(root / "photos"), root / "classes", **common))
    text = {"text": str(root / "t5"), "text_length": 8}
    precompute(settings(captioned(root / "scenes"), root / "captions", **common, **text))
    return root


def on_classes(root: Path, run_dir: Path, *overrides: str):
    return tiny_config(run_dir, f"data.name={root / 'classes'}", *overrides)


def on_captions(root: Path, run_dir: Path, *overrides: str):
    words = (f"data.name={root / 'captions'}", "text.cache=none", "text.max_length=null")
    return tiny_config(run_dir, *words, *overrides, recipe="digit-scenes")


def run_steps(trainer: Trainer, steps: int) -> list[dict]:
    return [
        {name: torch.as_tensor(value).tolist() for name, value in trainer.train_step().items()}
        for _ in range(steps)
    ]


def test_drawn_latents_have_the_stored_moments(root):
    data = LatentDataset(root / "classes")
    draws = torch.stack([data.sample(4, np.random.default_rng(seed)).image for seed in range(2000)])
    shard = data._shard(1)  # shards of four
    mean, std = shard.row("images", 0), shard.row("images_std", 0)
    assert ((draws.mean(0) - mean).abs() / std * 2000**0.5 < 5).all()
    assert ((draws.std(0) / std - 1).abs() < 0.1).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_and_position_alone(root, workers):
    data = LatentDataset(root / "captions", flip=True)
    loader = BatchLoader(data, 4, seed=5, num_workers=workers)
    batches = [next(loader) for _ in range(6)]
    again = BatchLoader(LatentDataset(root / "captions", flip=True), 4, seed=5)
    again.load_state_dict({**loader.state_dict(), "position": 3})
    for expected, got in zip(batches[3:], again, strict=False):
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert batches[0].text.shape == (4, 8, DIM)
    lengths = {caption: len(caption.split()) + 1 for caption in CAPTIONS}
    for batch in batches:
        assert batch.text_mask.sum(1).tolist() == [lengths[c] for c in batch.captions]
        assert not batch.text[~batch.text_mask].any()


@pytest.mark.parametrize("kind", ["classes", "text", "learned null", "workers"])
def test_n_plus_n_steps_equal_2n_steps_bit_for_bit(root, tmp_path, kind):
    def make(name: str) -> Trainer:
        if kind in ("classes", "workers"):
            workers = 2 if kind == "workers" else 0
            words = ("data.flip=true", f"data.num_workers={workers}")
            config = on_classes(root, tmp_path / name, *words)
        else:
            words = ("condition_dropout=0.4", "accumulate=2")
            if kind == "learned null":
                words += ("text.null=learned", "text.projection=linear",
                          "model_options.text_dim=24")  # fmt: skip
            config = on_captions(root, tmp_path / name, *words)
        return Trainer(config, tmp_path / name)

    whole = make("a")
    expected = run_steps(whole, 4)
    first = make("b")
    half = run_steps(first, 2)
    first.save()
    torch.manual_seed(999)
    second = make("b")
    assert second.resume()
    assert half + run_steps(second, 2) == expected
    for mine, other in ((whole.model, second.model), (whole.ema.model, second.ema.model)):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("null", ["empty", "zeros", "learned"])
def test_stored_text_trains_as_text_encoded_on_the_fly(root, tmp_path, null):
    plain = tmp_path / "plain"  # the same latents, with captions alone
    common = {"image_size": 16, "vae": str(root / "vae"), "flip": True}
    precompute(settings(root / "scenes", plain, **common))
    losses = []
    for data, words in (
        (root / "captions", ()),
        (plain, (f"text.encoder={root / 't5'}", "text.max_length=8")),
    ):
        config = on_captions(
            root, tmp_path / data.name, *words, f"data.name={data}", f"text.null={null}",
            "condition_dropout=0.3",
        )  # fmt: skip
        trainer = Trainer(config, tmp_path / data.name)
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        losses.append([values["loss"] for values in run_steps(trainer, 4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_dropped_text_is_the_null_caption(root, tmp_path):
    draws = []
    for dropout in (0.0, 1.0):
        config = on_captions(root, tmp_path, f"condition_dropout={dropout}")
        trainer = Trainer(config, tmp_path)
        draws.append(trainer.randomness.draw(trainer.loader.batch(0)).text)
    kept, dropped = draws
    assert dropped.is_null.all()
    assert dropped.mask.sum(1).tolist() == [1] * 8
    null = trainer.dataset.null_text
    for features in dropped.features:
        assert torch.equal(features[:1], null)
    captions = trainer.loader.batch(0).captions
    assert kept.is_null.tolist() == [caption == "" for caption in captions]
    assert torch.equal(kept.features, trainer.loader.batch(0).text)


def test_the_byte_encoder_reads_the_stored_captions(root, tmp_path):
    bytes_words = ("text.encoder=bytes", "text.cache=auto", "model_options.text_dim=32")
    config = on_captions(root, tmp_path, *bytes_words)
    trainer = Trainer(config, tmp_path)
    run_steps(trainer, 1)
    assert trainer.randomness.draw(trainer.loader.batch(0)).captions is not None
    short = on_captions(root, tmp_path, *bytes_words, "text.max_length=12")
    with pytest.raises(ValueError, match=r"'one two three four'... has 18 bytes; text.max_length"):
        Trainer(short, tmp_path)


def test_text_settings_that_contradict_the_stored_text(root, tmp_path):
    for override, message in (
        ("text.max_length=9", "text.max_length=9, and .* holds text encoded with 8"),
        ("text.dtype=bf16", "text.dtype='bf16', and .* 'fp32'"),
        ("text.layer=-2", "text.layer=-2, and .* -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(on_captions(root, tmp_path, override), tmp_path)


def test_samples_are_decoded_and_only_pixels_are_clamped(root, tmp_path):
    trainer = Trainer(on_classes(root, tmp_path), tmp_path)
    with torch.no_grad():  # a model whose latents leave [-1, 1]
        trainer.ema.model.backbone.final_layer.linear.bias.fill_(4.0)
    artist = trainer.artist()
    assert artist.image_shape == (4, 8, 8)
    seen: list[torch.Tensor] = []
    decode = artist.decode
    artist = replace(artist, decode=lambda latents: decode(seen.append(latents) or latents))
    images = artist.draw(Prompts(torch.tensor([0, 1]), None), [1, 2])
    assert images.shape == (2, 3, 16, 16)
    assert seen[0].abs().max() > 2
    expected = VAE(str(root / "vae")).decode(seen[0]).clamp(-1, 1)
    assert torch.equal(images, expected)
    bare = replace(trainer.artist(), decode=None)
    assert torch.equal(bare.draw(Prompts(torch.tensor([0, 1]), None), [1, 2]), seen[0])


def test_a_run_without_the_vae_trains_and_says_so_and_draws_where_it_is(root, tmp_path, capsys):
    data = tmp_path / "data"
    for name in ("classes", "vae"):
        shutil.copytree(root / name, data / name)
    source = (data / "classes" / "latents.json").read_text()
    away = source.replace(str(root / "vae"), str(tmp_path / "nowhere"))
    (data / "classes" / "latents.json").write_text(away)
    run_dir = tmp_path / "run"
    overrides = ("steps=2", "sample_every=1", "save_every=1")
    config = on_classes(data, run_dir, *overrides)
    assert train.train(config) == 0
    printed = capsys.readouterr().out
    assert printed.count("Training without sample grids: there is no VAE at") == 1
    assert "Set data.vae" in printed
    assert not list(run_dir.glob("*.png"))
    loaded = load_run(run_dir, "cpu")
    with pytest.raises(ValueError, match="there is no VAE at"):
        loaded.artist.draw(Prompts(torch.tensor([0]), None), [0])
    longer = on_classes(data, tmp_path / "run2", *overrides, f"data.vae={data / 'vae'}")
    assert train.train(longer) == 0
    assert (tmp_path / "run2" / "samples_00000001.png").exists()
    assert (tmp_path / "run2" / "samples.png").exists()
    shutil.rmtree(data / "classes")  # drawing needs none of the data
    loaded = load_run(tmp_path / "run2", "cpu")
    assert loaded.artist.draw(Prompts(torch.tensor([0]), None), [0]).shape == (1, 3, 16, 16)


def test_captions_are_drawn_with_the_encoder_of_the_stored_text(root, tmp_path):
    run_dir = tmp_path / "run"
    config = on_captions(root, run_dir, "steps=1", "sample_every=1", "evaluation.enabled=false")
    assert train.train(config) == 0
    assert (run_dir / "samples.txt").read_text().splitlines()[:2] == list(CAPTIONS[:2])
    loaded = load_run(run_dir, "cpu")
    images = loaded.artist.draw(Prompts(None, ["a red seven"]), [3], guidance_scale=2.0)
    assert images.shape == (1, 3, 16, 16)


def test_a_run_on_stored_text_trains_without_its_encoder(root, tmp_path, capsys):
    shutil.copytree(root / "captions", tmp_path / "captions")
    path = tmp_path / "captions" / "latents.json"
    path.write_text(path.read_text().replace(str(root / "t5"), str(tmp_path / "nowhere")))
    config = on_captions(tmp_path, tmp_path / "run", "steps=1", "evaluation.enabled=false")
    assert train.train(config) == 0
    assert "Training without sample grids: no text encoder:" in capsys.readouterr().out


def test_a_run_with_another_vae_or_encoder_says_so_at_the_start(root, tmp_path, capsys):
    save_vae(tmp_path / "vae", seed=5)
    save_t5(tmp_path / "t5", seed=5)
    for k, (override, message) in enumerate((
        (f"data.vae={tmp_path / 'vae'}", "the latents were made with"),
        (f"text.encoder={tmp_path / 't5'}", "not the one that the features are from"),
    )):  # fmt: skip
        overrides = ("steps=1", "sample_every=1", "evaluation.enabled=false", override)
        assert train.train(on_captions(root, tmp_path / f"run{k}", *overrides)) == 0
        printed = capsys.readouterr().out
        assert message in printed.split("Training without sample grids: ")[1]


def test_flips_that_are_not_stored_and_sizes_that_are_fixed(root, tmp_path):
    precompute(settings("digits", tmp_path / "digits", shard_size=500))
    for override, message in (
        ("data.flip=true", "has no mirrored images"),
        ("data.image_size=8", "that of the precomputed .* is fixed"),
        (f"data.vae={root / 'vae'}", "data.vae=.* has no effect on digits@"),
    ):
        config = tiny_config(tmp_path / "run", f"data.name={tmp_path / 'digits'}", override)
        with pytest.raises(ValueError, match=message):
            Trainer(config, tmp_path / "run")


def test_latents_made_again_are_other_data(root, tmp_path):
    shutil.copytree(root / "classes", tmp_path / "classes")
    config = on_classes(tmp_path, tmp_path / "run")
    trainer = Trainer(config, tmp_path / "run")
    trainer.save()
    manifest = tmp_path / "classes" / "latents.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(Exception, match="the loader state has dataset ="):
        Trainer(config, tmp_path / "run").resume()
